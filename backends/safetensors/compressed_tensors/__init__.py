"""The compressed-tensors format, for vLLM and transformers.

Nothing of it is public: whoever loads such a bundle does so without rotq.
"""

__all__: list[str] = []
