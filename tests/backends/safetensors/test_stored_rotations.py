"""Rotations that a bundle spells out multiply to the matrices that they stand for."""

from __future__ import annotations

import pytest
import torch

from backends.safetensors.source import _rotation_tensors
from backends.safetensors.stored_rotations import multiplied
from calib.rotations.rotation_set import hadamard_rotation


@pytest.mark.parametrize(
    ("order", "block"), [(8, None), (12, None), (96, None), (88, None), (96, 32), (704, None)]
)
@pytest.mark.parametrize("seed", [None, 3])
def test_factors_and_signs_multiply_to_the_rotation(
    order: int, block: int | None, seed: int | None
) -> None:
    rotation = hadamard_rotation("r4", order, layer=0, seed=seed, block=block)
    tensors = _rotation_tensors(rotation)
    factors = [tensors[f"factors.{k}"] for k in range(len(tensors) - 1)]
    identity = torch.eye(order, dtype=torch.float64)
    found = multiplied(identity, tensors["signs"], factors)
    # float64, sums of up to 704 terms
    torch.testing.assert_close(found, rotation.dense(), rtol=0, atol=1e-13)
