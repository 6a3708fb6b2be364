"""Rotations that were made elsewhere: rotq's own folders, DartQuant's ``r1.pt`` / ``r2.pt`` and
SpinQuant's ``R.bin``, told apart by their names.

DartQuant keeps R1 and R2 in two files, so several paths make one set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from calib.architectures import Wiring
from calib.errors import RotationError
from calib.files.reading import reason_of, regular_file
from calib.rotations.files import MANIFEST, TENSORS, load_rotations
from calib.rotations.rotation_set import (
    ORTHOGONALITY_TOLERANCE,
    Rotation,
    RotationSet,
    fused_rotation,
    orthogonality_defect,
)

_FOREIGN = ("r1.pt", "r2.pt", "R.bin")
_HINT = (
    f"give a folder that rotq wrote, its {TENSORS}, DartQuant's r1.pt and r2.pt, or SpinQuant's"
    " R.bin"
)
_R2_KEY = "model.layers.{i}.self_attn.R2"


def import_rotations(paths: Iterable[str | os.PathLike[str]], wiring: Wiring) -> RotationSet:
    """Read rotations and check that they fit a model.

    Args:
        paths: folders, or files named ``*.safetensors`` (rotq's, its manifest beside it), ``*.pt``
            (DartQuant) or ``*.bin`` (SpinQuant). A folder is rotq's own, or holds foreign files
            under their usual names.
        wiring: that of the model.

    Returns:
        One set; the origin of every rotation names the file that it comes from.

    Raises:
        RotationError: a path does not exist or is of no known kind, a rotation is there twice, R2
            is there for some layers only, or something has the wrong shape or is not orthogonal
            (with the figure).
    """
    sizes = wiring.sizes
    rotations: list[Rotation] = []
    for path in paths:
        for file in _sources(Path(path)):
            rotations += [
                replace(rotation, origin=f"{rotation.origin}, from {file.name}".removeprefix(", "))
                for rotation in _read(file, sizes.kv_heads).values()
            ]
    result = RotationSet(rotations)
    if not result:
        raise RotationError("the given files hold no rotation", hint=_HINT)

    result.validate(wiring)
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


def rotation_files(path: Path) -> list[Path]:
    """The files that :func:`import_rotations` reads for one of its paths.

    Raises:
        RotationError: there is none.
    """
    files = list(_sources(path))
    manifests = [file.with_name(MANIFEST) for file in files if file.name == TENSORS]
    return [*files, *(manifest for manifest in manifests if manifest.is_file())]


def _sources(path: Path) -> Iterator[Path]:
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
        loaded = torch.load(regular_file(path), map_location="cpu", weights_only=True)
    except Exception as error:  # anything that a malformed or hostile pickle raises
        reason = reason_of(error) if str(error).strip() else "it is empty or cut off"
        raise RotationError(
            f"{path} cannot be read as a file of rotation matrices: {reason}",
            hint="it must be a dictionary of tensors written by torch.save",
        ) from error
    if not isinstance(loaded, dict) or not all(map(_is_plain, loaded.values())):
        raise RotationError(
            f"{path} does not hold a dictionary of float tensors",
            hint="pass r1.pt, r2.pt or R.bin",
        )
    return loaded


def _is_plain(value: object) -> bool:
    """Whether ``value`` is a tensor of floats that lie in memory as they are, none of them twice:
    a few bytes can stand for gigabytes else.
    """
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested)
        and value.is_floating_point()
        and value.numel() > 0
        and value.untyped_storage().nbytes() >= value.nbytes
    )


def _from_tensors(tensors: dict[str, Tensor], kv_heads: int, origin: str) -> RotationSet:
    pattern = re.compile(re.escape(_R2_KEY).replace(r"\{i\}", r"([0-9]{1,9})"))
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
