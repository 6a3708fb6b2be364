"""The files of a written folder, by name. Torch-free."""

from __future__ import annotations

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
"""The weights, in one file."""
DATA_SHARDS = "model-*-of-*.onnx.data"
"""The same in several; see :mod:`backends.onnx.save`."""
GENAI_FILE = "genai_config.json"
GENAI_DTYPES = ("float32",)
"""What onnxruntime-genai runs on a CPU; targets that compute in something else get no
:data:`GENAI_FILE`."""
