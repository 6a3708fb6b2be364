"""Bundles for networks built with the TensorRT Python API."""
