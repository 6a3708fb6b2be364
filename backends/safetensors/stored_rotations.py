"""Online rotations that a bundle spells out, multiplied as :mod:`backends.safetensors.source` says
that they are, against the rotations of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backends.safetensors.read import Bundle
from backends.safetensors.source import online_rotations, rotated_modules
from calib.artifact import QuantizedModel
from calib.rotations.hadamard import random_signs
from calib.rotations.rotation_set import Rotation

_ROWS = 4
"""Random rows that both multiply. Which entry of a factor were wrong does not matter: each touches
all of them."""


def rotation_contradictions(bundle: Bundle, model: QuantizedModel) -> Iterator[str]:
    """Stored rotations that are not those of ``model``, in words."""
    expected, stored = online_rotations(model), rotated_modules(bundle.tensors)
    for module in sorted(expected.keys() ^ stored.keys()):
        yield f"'{module}' {'is not' if module in expected else 'is'} rotated"
    for module in sorted(expected.keys() & stored.keys()):
        rotation, tensors = expected[module], bundle.tensors
        signs = tensors[f"{module}.rotation.signs"].double()
        factors = [
            tensors[f"{module}.rotation.factors.{k}"].double() for k in range(stored[module])
        ]
        if not torch.equal(signs, _signs(rotation)):
            yield f"'{module}.rotation.signs' are not those of {rotation.name}"
        elif not _same(rotation, signs, factors, model.dtype):
            yield f"'{module}.rotation.factors' are not those of {rotation.name}"


def multiplied(x: Tensor, signs: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x`` ``[rows, n]`` rotated by ``signs`` ``[n]`` and ``factors`` ``[m, m]`` in turn."""
    rows, width = x.shape
    x = x * signs
    done = width // math.prod(len(factor) for factor in factors)
    for factor in factors:
        order = len(factor)
        rest = width // (done * order)
        parts = x.reshape(rows, done, order, rest)
        x = factor @ parts if rest > 1 else parts.squeeze(-1) @ factor
        done *= order
    return x.reshape(rows, width)


def _signs(rotation: Rotation) -> Tensor:
    assert rotation.order is not None  # online rotations are Hadamard matrices
    if rotation.seed is None:
        return torch.ones(rotation.order, dtype=torch.float64)
    return random_signs(rotation.order, rotation.seed).double()


def _same(rotation: Rotation, signs: Tensor, factors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether both rotate alike: each factor was rounded to ``dtype`` once, by half an eps at most
    relative to each entry, so that the product is off by that for each factor, and is allowed
    twice as much.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, len(signs), generator=generator, dtype=torch.float64)
    expected = rotation.apply(x)
    lost = (multiplied(x, signs, factors) - expected).norm() / expected.norm()
    return float(lost) <= len(factors) * torch.finfo(dtype).eps
