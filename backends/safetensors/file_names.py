"""Files of every bundle. Imports no torch."""

from __future__ import annotations

INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "rotq_bundle.json"
MAX_SHARD_BYTES = 5 * 10**9
"""What the hub's own tools split at."""
