"""Safetensors bundles: weights and scales under the keys, shapes, dtypes and packing of one target
each.

Public are the backend, reading a bundle, and what ``tripy`` and ``tensorrt`` have for those who
load one; everything else may change.
"""

__all__ = ["backend", "read", "tensorrt", "tripy"]
