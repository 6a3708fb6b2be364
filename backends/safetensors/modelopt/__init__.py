"""NVIDIA ModelOpt's unified Hugging Face checkpoint, for TensorRT-LLM and vLLM.

Nothing of it is public: whoever loads such a bundle does so without rotq.
"""

__all__: list[str] = []
