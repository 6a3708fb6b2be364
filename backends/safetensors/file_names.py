"""The files of a bundle, by name. Torch-free."""

from __future__ import annotations

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_SHARDS = "model-*-of-*.safetensors"
CONFIG_FILE = "config.json"
"""Of the targets that want settings in it."""
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "rotq_bundle.json"
STATEMENT_FILE = "tripy.json"
"""Of ``tripy``: how each linear is stored and must be built."""
QUANT_CONFIG_FILE = "hf_quant_config.json"
"""Of ``modelopt``: what is quantized how."""
PREFIX_FILES = ("prefix.safetensors", "prefix.json")
"""What :func:`calib.artifact.save_prefix` writes; only where a model has a prefix."""
MAX_SHARD_BYTES = 5 * 10**9
"""What the hub's own tools split at."""
