"""Bundles for NVIDIA Tripy: keys of its nanoGPT example and of a Llama in the same style.

Public are the modules that ``__all__`` names.
"""

__all__ = ["huggingface", "loader", "modules"]
