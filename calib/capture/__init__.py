"""Streaming capture of the activations that rotations are trained on, in memory that does not grow
with the data.
"""
