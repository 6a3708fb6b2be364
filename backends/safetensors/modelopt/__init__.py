"""NVIDIA ModelOpt's unified Hugging Face checkpoint, for TensorRT-LLM and vLLM."""
