"""Bundles for networks built with the TensorRT Python API.

Public are the modules that ``__all__`` names.
"""

__all__ = ["api", "example_llama_block", "loader", "network"]
