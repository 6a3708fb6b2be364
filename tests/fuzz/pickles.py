"""Files of torch.save that hold something else than rotations, and pickles that run code."""

from __future__ import annotations

import io
import os
import pickle  # noqa: TID251 -- only written: what rotq must not load
import zipfile
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor, nn

from tests.fuzz.examine import SENTINEL
from tests.fuzz.mutations import mutate_bytes

R2 = "model.layers.{}.self_attn.R2"


class _Payload:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (SENTINEL,)


def mutate_pickle(data: bytes, rng: Random) -> bytes:
    """A file of rotations, changed as bytes, inside its archive, or made of something else."""
    match rng.randrange(6):
        case 0:
            return mutate_bytes(data, rng)
        case 1 | 2:
            return _inside(data, rng)
        case 3:
            return _payload(rng)
    return _saved({_name(rng): _tensor(rng) for _ in range(rng.choice((0, 1, 1, 2, 3)))}, rng)


def _inside(data: bytes, rng: Random) -> bytes:
    """The archive with the bytes of one member changed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, RuntimeError):
        return mutate_bytes(data, rng)
    changed = rng.choice(list(members))
    members[changed] = mutate_bytes(members[changed], rng)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return written.getvalue()


def _payload(rng: Random) -> bytes:
    """A pickle that makes a folder when it is loaded."""
    content = rng.choice((_Payload(), {"R1": _Payload()}, [_Payload()]))
    if rng.random() < 0.5:
        return pickle.dumps(content, protocol=rng.randrange(6))
    return _saved(content, rng)


def _saved(content: object, rng: Random) -> bytes:
    written = io.BytesIO()
    torch.save(content, written, _use_new_zipfile_serialization=rng.random() < 0.8)
    return written.getvalue()


def _name(rng: Random) -> str:
    return rng.choice(
        ("R1", R2.format(0), R2.format(1), R2.format("9" * 4400), R2.format("٣"), "R3")
    )


def _tensor(rng: Random) -> object:
    size = rng.choice((0, 1, 8, 32, 33))
    square = torch.eye(size)
    ways: tuple[Callable[[], object], ...] = (
        lambda: square,
        lambda: square.double(),
        lambda: square.half(),
        lambda: square.to(torch.float8_e4m3fn),
        lambda: square.int(),
        lambda: square.bool(),
        lambda: square.to(torch.complex64),
        lambda: square.to_sparse(),
        lambda: square.to_sparse_csr(),
        lambda: square.expand(rng.choice((2, 3, 4)), size, size).contiguous(),
        lambda: torch.quantize_per_tensor(square, 0.1, 0, torch.qint8),
        lambda: torch.full((size, size), float("nan")),
        lambda: torch.full((size, size), 1e300, dtype=torch.float64),
        lambda: torch.eye(8).to("meta"),
        lambda: torch.zeros(size),
        lambda: torch.tensor(1.0),
        lambda: torch.ones(1).expand(2**20, 2**20),
        lambda: torch.ones(1).expand(4, 2**15, 2**15),
        lambda: nn.Parameter(square),
        lambda: {"R1": square},
        lambda: "text",
        lambda: 1,
        lambda: [square],
        lambda: torch.nested.nested_tensor([square, square]) if size else Tensor(),
    )
    return rng.choice(ways)()
