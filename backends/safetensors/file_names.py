"""The files of a bundle, by name. Torch-free."""

from __future__ import annotations

WEIGHTS_FILE = "model.safetensors"
"""In one file; several are ``model-00001-of-0000n.safetensors`` and so on."""
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "rotq_bundle.json"
STATEMENT_FILE = "tripy.json"
"""Of ``tripy``: how each linear is stored and must be built."""
QUANT_CONFIG_FILE = "hf_quant_config.json"
"""Of ``modelopt``: what is quantized how."""
MAX_SHARD_BYTES = 5 * 10**9
"""What the hub's own tools split at."""
