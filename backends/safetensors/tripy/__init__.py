"""Bundles for NVIDIA Tripy: keys of its nanoGPT example and of a Llama in the same style."""
