"""Safetensors bundles: weights and scales under the keys, shapes, dtypes and packing of one target
each.
"""
