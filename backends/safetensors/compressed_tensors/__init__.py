"""The compressed-tensors format, for vLLM and transformers."""
