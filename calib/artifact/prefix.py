"""The prefix of a model: tokens that stand before every sequence, as keys and values.

Saved as ``prefix.safetensors`` (``{layer}.key`` and ``{layer}.value``) beside ``prefix.json``,
which holds the token ids and why they are there. What it is for, and how a model sees it, is in
:mod:`calib.network.prefix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib.errors import CheckpointError
from calib.files.reading import MALFORMED, reason_of, regular_file
from calib.files.sealed import read_sealed, write_sealed

PREFIX_TENSORS = "prefix.safetensors"
PREFIX_MANIFEST = "prefix.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values that stand before every sequence.

    Attributes:
        tokens: the ids that they were computed from, in order.
        keys: by layer, float ``[kv_heads, p, head_dim]``, after RoPE and R3.
        values: by layer, likewise, after R2.
        reason: why there is one, in words for the manifest.
    """

    tokens: tuple[int, ...]
    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    reason: str = ""

    @property
    def length(self) -> int:
        """p, the number of tokens."""
        return len(self.tokens)

    def to(self, dtype: torch.dtype) -> Prefix:
        """The same prefix with keys and values in ``dtype``."""
        keys, values = (
            {layer: tensor.to(dtype) for layer, tensor in part.items()}
            for part in (self.keys, self.values)
        )
        return Prefix(self.tokens, keys, values, self.reason)


def save_prefix(prefix: Prefix, folder: Path) -> None:
    """Write ``prefix`` into ``folder``, which must exist."""
    tensors = {
        f"{layer}.{part}": tensor.contiguous()
        for part, by_layer in (("key", prefix.keys), ("value", prefix.values))
        for layer, tensor in by_layer.items()
    }
    save_file(tensors, folder / PREFIX_TENSORS)
    manifest = {
        "format_version": _FORMAT_VERSION,
        "tokens": list(prefix.tokens),
        "layers": len(prefix.keys),
        "reason": prefix.reason,
    }
    write_sealed(folder / PREFIX_MANIFEST, manifest, [PREFIX_TENSORS])


def load_prefix(folder: Path) -> Prefix | None:
    """What :func:`save_prefix` wrote into ``folder``; ``None`` where there is no prefix.

    Raises:
        CheckpointError: it is incomplete, damaged, or of a later format version.
    """
    manifest = folder / PREFIX_MANIFEST
    if not manifest.is_file():
        return None
    try:
        entry = read_sealed(manifest, lambda values: _check_version(folder, values))
        tensors = load_file(regular_file(folder / PREFIX_TENSORS))
        keys, values = (
            {layer: tensors[f"{layer}.{part}"] for layer in range(entry["layers"])}
            for part in ("key", "value")
        )
        prefix = Prefix(tuple(map(int, entry["tokens"])), keys, values, str(entry["reason"]))
        whole = all(
            tensor.dim() == 3 and tensor.shape[1] == prefix.length
            for tensor in (*keys.values(), *values.values())
        )
    except (OSError, *MALFORMED, SafetensorError) as error:
        raise CheckpointError(
            f"the prefix in '{folder}' is damaged: {reason_of(error)}",
            hint=f"it needs {PREFIX_MANIFEST} and {PREFIX_TENSORS}, both written by rotq",
        ) from error
    if not whole:
        raise CheckpointError(
            f"the prefix in '{folder}' has keys and values that are not of its tokens",
            hint="write it again",
        )
    return prefix


def _check_version(folder: Path, manifest: Mapping[str, Any]) -> None:
    version = manifest["format_version"]
    if version != _FORMAT_VERSION:
        raise CheckpointError(
            f"the prefix in '{folder}' has format version {version}, this rotq reads"
            f" {_FORMAT_VERSION}",
            hint="use the version of rotq that wrote it, or write it again",
        )
