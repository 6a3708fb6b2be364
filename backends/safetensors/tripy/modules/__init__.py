"""Tripy modules that read ``tripy`` bundles. The files import nvtripy; this package does not until
they are used.
"""

__all__ = ["build", "gpt", "linear", "llama"]
