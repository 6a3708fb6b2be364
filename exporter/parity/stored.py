"""Rung 0: the files themselves, before anything is run.

A reference that is computed from a file says nothing of what became of the file. So what the folder
holds is held against the artifact: codes, scales, zero points and biases of every quantized linear,
the scales of the cache, and the float tensors. Their SHA-256 are kept in the report, so that
``rotq verify``, which has no artifact, asks the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backends.altered import altered_cache, altered_parts, same_either_way
from backends.base import Backend, ReadsFloats
from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
from calib.artifact.files import cache_key
from exporter.parity.rows import not_run, row
from exporter.parity.subject import Subject
from exporter.reporting.report import ParityRow

CACHE = "KV cache"
"""Its name among those of the linears."""
_METRIC = "altered"
_LINEARS, _FLOATS = (
    "quantized linears, stored against calibrated",
    "float tensors, stored against rotated",
)


@dataclass(frozen=True)
class Stored:
    """What a folder holds, read back: once for all of rung 0."""

    linears: Mapping[str, QuantizedLinear]
    cache: QuantizedCache | None
    floats: Mapping[str, Tensor]
    """Empty where the backend reads none."""

    @classmethod
    def read(cls, backend: Backend, folder: Path, target: str) -> Stored:
        """What ``backend`` finds in ``folder``."""
        floats = backend.read_floats(folder, target) if isinstance(backend, ReadsFloats) else {}
        return cls(backend.read_linears(folder, target), backend.read_cache(folder, target), floats)


def kept_digests(
    quantized: QuantizedModel, backend: Backend, folder: Path, target: str
) -> dict[str, str]:
    """SHA-256 of every quantized linear, of the cache, and of the float tensors that the backend
    reads back, by name, as ``folder`` holds them; of what it holds otherwise than the artifact
    those of the artifact.
    """
    stored = Stored.read(backend, folder, target)
    digests = {}
    for name, linear in quantized.linears.items():
        found_linear = stored.linears.get(name)
        same = found_linear is not None and not altered_parts(found_linear, linear)
        digests[name] = _digest((found_linear if same and found_linear else linear).tensors())

    if quantized.cache is not None:
        altered = altered_cache(stored.cache, quantized.cache)
        kept = quantized.cache if altered or stored.cache is None else stored.cache
        digests[CACHE] = _digest(_scales(kept))

    for name, found in stored.floats.items():
        expected = quantized.floats.get(name)
        if expected is not None:
            digests[name] = _digest({name: found if same_either_way(found, expected) else expected})
    return digests


def stored_rows(subject: Subject, stored: Stored) -> list[ParityRow]:
    """The figures of rung 0: how many are not what they were."""
    rows = []
    if subject.quantized.linears or subject.quantized.cache is not None:
        rows.append(_judged(_LINEARS, subject, _found_linears(stored)))
    if isinstance(subject.backend, ReadsFloats):
        floats = {name: _digest({name: tensor}) for name, tensor in stored.floats.items()}
        rows.append(_judged(_FLOATS, subject, floats))
    return rows


def _found_linears(stored: Stored) -> dict[str, str]:
    found = {name: _digest(linear.tensors()) for name, linear in stored.linears.items()}
    return found if stored.cache is None else {**found, CACHE: _digest(_scales(stored.cache))}


def _judged(name: str, subject: Subject, found: Mapping[str, str]) -> ParityRow:
    """Checksums that were found against those that were kept."""
    floats = subject.quantized.floats.keys()
    kept = {
        key: digest
        for key, digest in subject.digests.items()
        if (key in floats) == (name == _FLOATS)
    }
    if not kept:
        return not_run(0, name, _METRIC, "the report is of a version that kept no checksums")
    altered = sorted(key for key in found.keys() | kept.keys() if found.get(key) != kept.get(key))
    note = f"{len(kept)} compared"
    if altered:
        note += f"; altered: {', '.join(altered[:3])}"
    return row(0, name, _METRIC, float(len(altered)), 0.0, note)


def _scales(cache: QuantizedCache) -> dict[str, Tensor]:
    return {
        cache_key(layer, part): scale
        for part, scales in (("key", cache.key_scale), ("value", cache.value_scale))
        for layer, scale in scales.items()
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, as hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
