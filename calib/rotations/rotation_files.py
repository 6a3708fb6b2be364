"""Rotations on disk: rotq's own format, DartQuant's ``r1.pt`` / ``r2.pt``, and SpinQuant's
``R.bin``.

rotq writes ``rotations.safetensors`` (float64 matrices by rotation name) beside ``rotations.json``,
the manifest: for each rotation its name, kind, space, layer, order, seed, whether it is folded or
online, and how it was chosen.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib.architectures import Space
from calib.errors import RotationError
from calib.rotations.rotation_set import (
    ORTHOGONALITY_TOLERANCE,
    Rotation,
    RotationSet,
    fused_rotation,
    orthogonality_defect,
)

FORMAT_VERSION = 1
TENSORS = "rotations.safetensors"
MANIFEST = "rotations.json"
_R2_KEY = "model.layers.{i}.self_attn.R2"
_FIELDS = ("name", "kind", "space", "layer", "order", "seed", "online", "origin")


def save_rotations(rotations: RotationSet, folder: str | os.PathLike[str]) -> None:
    """Write ``rotations.safetensors`` and ``rotations.json`` into ``folder``, which is created if
    need be.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    matrices = {
        name: r.matrix.contiguous().cpu() for name, r in rotations.items() if r.matrix is not None
    }
    save_file(matrices, target / TENSORS)
    entries = [
        {field: getattr(rotation, field) for field in _FIELDS} for rotation in rotations.values()
    ]
    manifest = {"format_version": FORMAT_VERSION, "rotations": entries}
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def load_rotations(folder: str | os.PathLike[str]) -> RotationSet:
    """Read what :func:`save_rotations` wrote.

    Raises:
        RotationError: a file is missing or damaged, a matrix is missing, or the format is of a
            later version.
    """
    source = Path(folder)
    try:
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
        entries = manifest["rotations"]
        matrices = load_file(source / TENSORS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RotationError(
            f"the rotations in {source} cannot be read: {error}",
            hint=f"the folder needs {MANIFEST} and {TENSORS}, both written by rotq",
        ) from error
    if version != FORMAT_VERSION:
        raise RotationError(
            f"the rotations in {source} have format version {version}; this rotq reads version"
            f" {FORMAT_VERSION}",
            hint="use the version of rotq that wrote them",
        )
    return RotationSet(_from_entry(entry, matrices, source) for entry in entries)


def _from_entry(entry: Any, matrices: dict[str, Tensor], source: Path) -> Rotation:
    try:
        values = {field: entry[field] for field in _FIELDS}
        values["space"] = Space(values["space"])
    except (KeyError, TypeError, ValueError) as error:
        raise RotationError(
            f"{MANIFEST} in {source} is damaged: {error!r}", hint="write it again"
        ) from error
    matrix = matrices.get(values["name"])
    if matrix is None and values["order"] is None:
        raise RotationError(f"the matrix of {values['name']} is missing from {source / TENSORS}")
    return Rotation(**values, matrix=matrix)


def import_dartquant(
    r1: str | os.PathLike[str] | None, r2: str | os.PathLike[str] | None, *, kv_heads: int
) -> RotationSet:
    """Read DartQuant's ``r1.pt`` (``{"R1": [n, n]}``) and ``r2.pt``
    (``{"model.layers.{i}.self_attn.R2": ...}``).

    An R2 is ``[kv_heads, d, d]``; ``[heads, d, d]`` is accepted where the query heads of each KV
    group agree. Matrices that pass the orthogonality test are projected onto the nearest orthogonal
    matrix in float64, so that folding them is as exact as folding any other.

    Raises:
        RotationError: a file cannot be read safely or holds something else, a matrix is not
            orthogonal, or the query heads of one KV group differ.
    """
    tensors: dict[str, Tensor] = {}
    for path in (r1, r2):
        if path is not None:
            tensors |= _load_pickle(Path(path))
    return _from_tensors(tensors, kv_heads, "DartQuant")


def import_spinquant(path: str | os.PathLike[str], *, kv_heads: int) -> RotationSet:
    """Read SpinQuant's ``R.bin``: ``R1 [n, n]``, and per layer one R2 ``[d, d]`` that all KV heads
    share.

    Raises:
        RotationError: as for :func:`import_dartquant`.
    """
    return _from_tensors(_load_pickle(Path(path)), kv_heads, "SpinQuant")


def export_dartquant(rotations: RotationSet, folder: str | os.PathLike[str]) -> None:
    """Write R1 to ``r1.pt`` and the R2 to ``r2.pt`` in ``folder``, float64, for DartQuant or our
    importer.

    An R2 that is a Hadamard matrix is written as the one ``[d, d]`` that all KV heads share.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    r1 = rotations.r1()
    if r1 is not None:
        torch.save({"R1": r1.dense()}, target / "r1.pt")
    r2 = {
        _R2_KEY.replace("{i}", str(r.layer)): r.dense()
        for r in rotations.values()
        if r.kind == "r2"
    }
    if r2:
        torch.save(r2, target / "r2.pt")


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything that a malformed or hostile pickle raises
        raise RotationError(
            f"{path} cannot be read as a file of rotation matrices:"
            f" {str(error).strip().splitlines()[0]}",
            hint="it must be a dictionary of tensors written by torch.save",
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(value, Tensor) for value in loaded.values()
    ):
        raise RotationError(
            f"{path} does not hold a dictionary of tensors", hint="pass r1.pt, r2.pt or R.bin"
        )
    return loaded


def _from_tensors(tensors: dict[str, Tensor], kv_heads: int, origin: str) -> RotationSet:
    pattern = re.compile(re.escape(_R2_KEY).replace(r"\{i\}", r"(\d+)"))
    rotations = []
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if name == "R1":
            rotations.append(fused_rotation("r1", tensor, origin=origin))
        elif match:
            matrix = _per_kv_head(name, tensor, kv_heads)
            rotations.append(fused_rotation("r2", matrix, layer=int(match[1]), origin=origin))
        else:
            raise RotationError(
                f"{origin} rotations hold an unknown entry {name!r}",
                hint=f"expected are R1 and {_R2_KEY}",
            )
    return RotationSet(_projected(rotations))


def _per_kv_head(name: str, tensor: Tensor, kv_heads: int) -> Tensor:
    """``[d, d]``, ``[kv_heads, d, d]`` or ``[heads, d, d]`` to ``[kv_heads, d, d]``."""
    if tensor.dim() == 2:
        return tensor.expand(kv_heads, *tensor.shape)
    if tensor.dim() != 3 or tensor.shape[0] % kv_heads:
        raise RotationError(
            f"{name} has shape {list(tensor.shape)}, which does not fit {kv_heads} KV heads"
        )
    groups = tensor.reshape(kv_heads, -1, *tensor.shape[1:])
    if not bool((groups == groups[:, :1]).all()):
        raise RotationError(
            f"{name} has another rotation for every query head, but the heads of one group share"
            " their values",
            hint="train one R2 per KV head",
        )
    return groups.select(1, 0)


def _projected(rotations: Iterable[Rotation]) -> Iterable[Rotation]:
    """Each rotation's nearest orthogonal matrix (its polar factor) in float64.

    The Newton-Schulz step ``Q <- Q (3 I - Q^T Q) / 2`` squares the defect: two of them take 1e-6
    below 1e-16.
    """
    for rotation in rotations:
        q = rotation.dense()
        if q.dim() < 2 or q.shape[-1] != q.shape[-2]:
            raise RotationError(
                f"{rotation.name} from {rotation.origin} has shape {list(q.shape)}: not square"
            )
        defect = orthogonality_defect(rotation)
        if not defect <= ORTHOGONALITY_TOLERANCE:
            raise RotationError(
                f"{rotation.name} from {rotation.origin} is not orthogonal: max |Q^T Q - I| is"
                f" {defect:.1e}, above {ORTHOGONALITY_TOLERANCE:.0e}",
                hint="export it in float32 or float64",
            )
        for _ in range(2):
            q = 1.5 * q - 0.5 * q @ (q.mT @ q)
        yield fused_rotation(rotation.kind, q, layer=rotation.layer, origin=rotation.origin)
