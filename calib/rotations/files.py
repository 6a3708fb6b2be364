"""Rotations on disk in rotq's own format.

``rotations.safetensors`` holds float64 matrices by rotation name; ``rotations.json`` beside it is
the manifest: for each rotation its name, kind, space, layer, order, seed, whether it is folded or
online, how it was chosen, and the size of its blocks where that was asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib.architectures import Space
from calib.errors import RotationError
from calib.files.reading import MALFORMED, reason_of, regular_file
from calib.files.sealed import read_sealed, write_sealed
from calib.rotations.rotation_set import Rotation, RotationSet

FORMAT_VERSION = 2
_WITHOUT_BLOCKS = 1
"""What is still written where no rotation has blocks of a size of its own: readers of that version
would pass over it, and compute something else."""
TENSORS = "rotations.safetensors"
MANIFEST = "rotations.json"
_FIELDS = ("name", "kind", "space", "layer", "order", "seed", "online", "origin")
_BLOCK = "block"


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
    blocked = any(rotation.block is not None for rotation in rotations.values())
    fields = (*_FIELDS, _BLOCK) if blocked else _FIELDS
    entries = [
        {field: getattr(rotation, field) for field in fields} for rotation in rotations.values()
    ]
    version = FORMAT_VERSION if blocked else _WITHOUT_BLOCKS
    manifest = {"format_version": version, "rotations": entries}
    write_sealed(target / MANIFEST, manifest, [TENSORS])


def load_rotations(folder: str | os.PathLike[str]) -> RotationSet:
    """Read what :func:`save_rotations` wrote.

    Raises:
        RotationError: a file is missing or damaged, a matrix is missing, or the format is of a
            later version.
    """
    source = Path(folder)
    try:
        # neither version asks for a seal: it was added to both
        manifest = read_sealed(
            source / MANIFEST, lambda values: _check_version(source, values), required=False
        )
        entries = list(manifest["rotations"])
        matrices = load_file(regular_file(source / TENSORS))
    except (OSError, *MALFORMED, SafetensorError) as error:
        raise RotationError(
            f"the rotations in {source} cannot be read: {reason_of(error)}",
            hint=f"the folder needs {MANIFEST} and {TENSORS}, both written by rotq",
        ) from error
    return RotationSet(_from_entry(entry, matrices, source) for entry in entries)


def _check_version(source: Path, manifest: dict[str, Any]) -> None:
    version = manifest["format_version"]
    if version not in (_WITHOUT_BLOCKS, FORMAT_VERSION):
        raise RotationError(
            f"the rotations in {source} have format version {version}; this rotq reads versions"
            f" {_WITHOUT_BLOCKS} and {FORMAT_VERSION}",
            hint="use the version of rotq that wrote them",
        )


def _from_entry(entry: Any, matrices: dict[str, Tensor], source: Path) -> Rotation:
    try:
        values = {field: entry[field] for field in _FIELDS}
        values["space"] = Space(values["space"])
        matrix = matrices.get(values["name"])
        numbers = (values["layer"], values["order"], values["seed"], entry.get(_BLOCK))
        if not all(number is None or _is_count(number) for number in numbers):
            raise ValueError("a layer, order, seed or block is no whole number of at least 0")
        if not isinstance(values["online"], bool) or not isinstance(values["origin"], str):
            raise TypeError("'online' is no truth value, or 'origin' no text")
        if matrix is None and values["order"] is None:
            raise RotationError(
                f"the matrix of {values['name']} is missing from {source / TENSORS}"
            )
        return Rotation(**values, matrix=matrix, block=entry.get(_BLOCK))
    except MALFORMED as error:
        raise RotationError(
            f"{MANIFEST} in {source} is damaged: {reason_of(error)}", hint="write it again"
        ) from error


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63
