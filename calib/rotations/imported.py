"""Rotations that were made elsewhere: rotq's own folders, DartQuant's and SpinQuant's files, told
apart by their names.

DartQuant keeps R1 and R2 in two files, so several paths make one set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.architectures import Architecture
from calib.errors import RotationError
from calib.rotations.rotation_files import (
    MANIFEST,
    TENSORS,
    import_dartquant,
    import_spinquant,
    load_rotations,
)
from calib.rotations.rotation_set import Rotation, RotationSet

_FOREIGN = ("r1.pt", "r2.pt", "R.bin")
_HINT = (
    f"give a folder that rotq wrote, its {TENSORS}, DartQuant's r1.pt and r2.pt, or SpinQuant's"
    " R.bin"
)


def import_rotations(
    paths: Iterable[str | os.PathLike[str]], config: Any, architecture: Architecture
) -> RotationSet:
    """Read rotations and check that they fit a model.

    Args:
        paths: folders, or files named ``*.safetensors`` (rotq's, its manifest beside it), ``*.pt``
            (DartQuant) or ``*.bin`` (SpinQuant). A folder is rotq's own, or holds foreign files
            under their usual names.
        config: the model's Hugging Face config.
        architecture: its table entry.

    Returns:
        One set; the origin of every rotation names the file that it comes from.

    Raises:
        RotationError: a path does not exist or is of no known kind, a rotation is there twice, R2
            is there for some layers only, or something has the wrong shape or is not orthogonal
            (with the figure).
    """
    sizes = architecture.dimensions(config)
    rotations: list[Rotation] = []
    for path in paths:
        for file in _files(Path(path)):
            rotations += [
                replace(rotation, origin=f"{rotation.origin}, from {file.name}".removeprefix(", "))
                for rotation in _read(file, sizes.kv_heads).values()
            ]
    result = RotationSet(rotations)
    if not result:
        raise RotationError("the given files hold no rotation", hint=_HINT)
    result.validate(config, architecture)
    for kind in result.kinds():
        layers = {rotation.layer for rotation in result.values() if rotation.kind == kind}
        missing = sorted(set(range(sizes.layers)) - layers) if kind != "r1" else []
        if missing:
            raise RotationError(
                f"the given files hold {kind.upper()} for some layers only; missing: "
                f"{', '.join(map(str, missing[:4]))}{' ...' if len(missing) > 4 else ''}",
                hint="use rotations that were made for this model",
            )
    return result


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise RotationError(f"there are no rotations at '{path}'", hint=_HINT)
    own = path / TENSORS
    found = (
        [own] if own.is_file() else [path / name for name in _FOREIGN if (path / name).is_file()]
    )
    if not found:
        raise RotationError(f"the folder '{path}' holds no rotations", hint=_HINT)
    yield from found


def _read(file: Path, kv_heads: int) -> RotationSet:
    match file.suffix:
        case ".safetensors":
            if file.name != TENSORS or not (file.parent / MANIFEST).is_file():
                raise RotationError(
                    f"'{file}' is not a rotation file of rotq: that is {TENSORS}, with {MANIFEST}"
                    " beside it",
                    hint=_HINT,
                )
            return load_rotations(file.parent)
        case ".pt":
            return import_dartquant(file, None, kv_heads=kv_heads)
        case ".bin":
            return import_spinquant(file, kv_heads=kv_heads)
        case _:
            raise RotationError(f"'{file}' is no rotation file that rotq knows", hint=_HINT)
