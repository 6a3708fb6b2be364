"""Rung 0, of the weights: whether rounding to nearest is what became of the rotated float weights.

Rounded to the nearest integer ``q`` of its format, a weight is half a step away at most:

    |w - (q - z) s| <= s / 2 + |w| eps

where ``eps`` is what weights and scales may have moved since ``q`` was chosen, from the dtype that
the artifact was made in to that of the target, and ``q`` is not the last of its format, beyond
which a weight is clipped. What an algorithm chose
otherwise (GPTQ, AdaRound) has no such bound: it is the worse for the weight and the better for the
output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib.arithmetic.grids import expand_grid
from calib.artifact import QuantizedLinear
from exporter.parity.rows import row
from exporter.parity.stored import Stored
from exporter.parity.subject import Subject
from exporter.reporting.report import ParityRow

HALF = 0.5 + 1e-3
"""Half a step; a thousandth of one for ties, which float32 divides to either side."""
MOVED = torch.finfo(torch.bfloat16).eps
"""Of a weight: two roundings to bfloat16, of itself and of its scale, or to a float16 below its
normal numbers as far as casting an artifact admits it. In weights of more than 64 steps a wrong
step hides behind that; most have fewer."""
_NEAREST = "rtn"
NEIGHBOUR = 2.0
"""In eps: the step to the next number is one eps at most, and casting an artifact to a shorter
dtype rounds twice."""


def rounding_rows(subject: Subject) -> list[ParityRow]:
    """The largest distance, in steps; nothing where the weights were not rounded to nearest, or the
    rotated model is not at hand.
    """
    algorithm = subject.quantized.provenance.recipe.get("weights", {}).get("algorithm")
    if subject.fused is None or algorithm != _NEAREST:
        return []
    distances = {
        name: _steps_away(linear, subject.fused.state[f"{name}.weight"])
        for name, linear in subject.quantized.linears.items()
        if linear.weight_scheme.format.kind == "integer"
        and linear.weight_order is None
        and f"{name}.weight" in subject.fused.state  # not those of single experts
    }
    if not distances:
        return []
    worst = max(distances, key=lambda name: distances[name])
    return [
        row(
            0,
            "quantized weights against rotated float weights",
            "steps",
            distances[worst],
            HALF,
            f"{len(distances)} linears, rounded to nearest; worst: {worst}",
        )
    ]


def float_rows(subject: Subject, stored: Stored) -> list[ParityRow]:
    """How far float tensors and biases, of the artifact and as the folder stores them, are from
    those of the rotated model, row by row: folded twice from the same numbers, they differ by an
    order of summation in float64, so that a value may be rounded to its neighbour; nothing where
    the model is not at hand.
    """
    if subject.fused is None:
        return []
    state = subject.fused.state
    apart = {
        f"{name}.bias": _apart(linear.bias, state[f"{name}.bias"])
        for name, linear in subject.quantized.linears.items()
        if f"{name}.bias" in state
    }
    for tensors in (subject.quantized.floats, stored.floats):
        for name, tensor in tensors.items():
            if name in state:
                apart[name] = max(apart.get(name, 0.0), _apart(tensor, state[name]))
    if not apart:
        return []
    worst = max(apart, key=lambda name: apart[name])
    note = f"{len(apart)} tensors; worst: {worst}"
    bound = NEIGHBOUR * torch.finfo(subject.quantized.dtype).eps
    name = "float tensors, calibrated against rotated"
    return [row(0, name, "of the largest of its row", apart[worst], bound, note)]


def _apart(found: Tensor | None, expected: Tensor) -> float:
    """The largest difference of a row over its largest magnitude, of a matrix either way round;
    infinite where there is none, or shapes differ.
    """
    if found is None:
        return math.inf
    turned = found.dim() == 2 and found.T.shape == expected.shape
    if turned and not torch.equal(found, expected):
        return min(_row_apart(found.T, expected), _row_apart(found, expected))
    return _row_apart(found, expected)


def _row_apart(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    rows = (
        tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1) for tensor in (found, expected)
    )
    one, other = (tensor.detach().cpu().float() for tensor in rows)
    # below the normal numbers of a dtype its steps are those of the smallest
    largest = other.abs().amax(-1).clamp(min=torch.finfo(expected.dtype).tiny)
    return float(((one - other).abs().amax(-1) / largest).amax())


def _steps_away(linear: QuantizedLinear, weight: Tensor) -> float:
    """The largest of ``|w / s - (q - z)| - |w / s| eps`` over what is not clipped."""
    fmt = linear.weight_scheme.format
    scale, zero = expand_grid(linear.grid, weight.shape, linear.weight_scheme.granularity)
    inside = (linear.weight > fmt.qmin) & (linear.weight < fmt.qmax)
    steps = linear.weight.float() if zero is None else linear.weight.float() - zero
    exact = weight.float() / scale
    away = (exact - steps).abs() - exact.abs() * MOVED
    return float(away[inside].amax()) if bool(inside.any()) else 0.0
