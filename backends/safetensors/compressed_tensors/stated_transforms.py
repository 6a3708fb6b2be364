"""``transform_config`` read back, and the matrices that it speaks of, against the online rotations
of the model.

Spelled out here once more, as vLLM has it: a transform at ``input`` multiplies what enters each of
its targets by ``M / sqrt(n)``, in blocks of ``head_dim`` where that is given. ``M`` is Sylvester's
matrix where the type is ``hadamard``, whatever is stored, and else what is stored under
``{target}.{group}_input.weight`` of one of the targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from backends.safetensors.names import Names
from backends.safetensors.source import online_rotations
from backends.stated import differing
from calib.artifact import QuantizedModel
from calib.rotations.rotation_set import Rotation

_ROWS = 4
"""Random rows that both multiply; each entry of a matrix touches them."""
_COLUMNS = 1024
"""Of a matrix that are multiplied in float64 at once."""
_SYLVESTER, _STORED = "hadamard", "random-hadamard"


def transform_contradictions(
    stated: Mapping[str, Any], tensors: Mapping[str, Tensor], model: QuantizedModel
) -> Iterator[str]:
    """What ``stated``, a ``transform_config``, and the matrices among ``tensors`` say otherwise
    than the rotations of ``model``, in words.
    """
    names = Names.of(model.config)
    rotations = {names.published(name): each for name, each in online_rotations(model).items()}
    groups = stated.get("config_groups") or {}
    rotated = {target: name for name, group in groups.items() for target in _targets(group)}
    for module in sorted(rotations.keys() ^ rotated.keys()):
        yield f"'{module}' {'is not' if module in rotations else 'is'} rotated"

    known: set[str] = set()
    for name, group in groups.items():
        keys = [f"{target}.{name}_input.weight" for target in _targets(group)]
        stored = {key: tensors[key] for key in keys if key in tensors}
        known |= stored.keys()
        own = [rotations[target] for target in _targets(group) if target in rotations]
        distinct = {(each.order, each.seed, each.block): each for each in own}
        for difference in _of_group(group, stored, list(distinct.values()), model.dtype):
            yield f"of '{name}' {difference}"
    for key in sorted(tensors.keys() - known):
        if key.endswith("_input.weight"):
            yield f"'{key}' belongs to no transform"


def _targets(group: Mapping[str, Any]) -> list[str]:
    return [target for each in group["apply"] for target in each["targets"]]


def _of_group(
    group: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    rotations: list[Rotation],
    dtype: torch.dtype,
) -> Iterator[str]:
    for applied in group["apply"]:
        where = {"location": applied["location"], "inverse": applied.get("inverse", False)}
        yield from differing(where, {"location": "input", "inverse": False})
        if applied.get("ignore"):
            yield f"'ignore' is {applied['ignore']!r}"
    kind, block = group["type"], group.get("head_dim")
    if kind not in (_SYLVESTER, _STORED):
        yield f"'type' is {kind!r}"
        return
    if not stored:
        yield "no matrix is stored"
    for rotation in rotations:
        order = rotation.block or rotation.order
        assert order is not None  # online rotations are Hadamard matrices
        if block != rotation.block:
            yield f"'head_dim' is {block!r} instead of {rotation.block!r}"
            continue
        matrices = dict(stored)
        if kind == _SYLVESTER:
            matrices["Sylvester's matrix"] = sylvester(order)
        for key, matrix in matrices.items():
            if not _same(rotation, matrix, order, dtype):
                yield f"'{key}' is not {rotation.name}"


def sylvester(order: int) -> Tensor:
    """Sylvester's Hadamard matrix ``[order, order]`` of ones and minus ones, of a power of two:
    the sign of an entry is the parity of the bits that its row and its column have in common.
    """
    common = torch.arange(order).unsqueeze(1) & torch.arange(order)
    parity = torch.zeros_like(common)
    for bit in range(order.bit_length()):
        parity ^= (common >> bit) & 1
    return 1.0 - 2.0 * parity.double()


def _same(rotation: Rotation, matrix: Tensor, order: int, dtype: torch.dtype) -> bool:
    """Whether ``x M / sqrt(n)`` is the rotation of ``x``. ``M`` was rounded to ``dtype`` once, by
    half an eps at most relative to each entry, and is allowed twice as much.
    """
    assert rotation.order is not None  # online rotations are Hadamard matrices
    if tuple(matrix.shape) != (order, order):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, rotation.order, generator=generator, dtype=torch.float64)
    expected = rotation.apply(x)
    blocks = x.reshape(_ROWS, -1, order)
    columns = torch.split(matrix, _COLUMNS, dim=1)
    found = torch.cat([blocks @ part.double() for part in columns], dim=-1) / math.sqrt(order)
    lost = (found.reshape(x.shape) - expected).norm() / expected.norm()
    return float(lost) <= torch.finfo(dtype).eps
