"""Limits of least expected squared quantization error.

    E(low, high) = Σ_bins count · (Q(v) - v)²,    v the middle of a bin, Q rounding to the grid of
    (low, high)

E has many small local minima, so each limit is searched on a geometric grid: 16 limits per octave,
10 octaves down from the largest magnitude, then twice as many between the two neighbours of the
best. Asymmetric limits take turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.arithmetic.grids import grid_of, round_to_grid
from calib.observers.histogram import Histogram
from calib.observers.rules import symmetric_limits, within
from calib.observers.statistics import Limits
from calib.schemes import TensorScheme

_STEPS = 16
"""Limits tried per octave."""
_OCTAVES = 10
_TURNS = 3
"""So often does each asymmetric limit take its turn to move to a neighbour."""
_CHUNK = 32
"""Limits whose errors are computed at once: an array of this times the filled bins."""


def mse_limits(histogram: Histogram, scheme: TensorScheme) -> Limits:
    """The limits whose static per-tensor grid has the least squared error over the histogram.

    Args:
        histogram: not empty.
        scheme: format and symmetry.
    """
    low, high = histogram.extremes.low, histogram.extremes.high
    points = histogram.points()
    if scheme.symmetric:
        amax = torch.tensor(histogram.amax, dtype=torch.float64)
        candidates = amax * _coarse()
        for _ in range(2):
            errors = _errors(points, -candidates, candidates, scheme)
            best = candidates[errors.argmin()]
            candidates = (best * _fine()).clamp(max=amax)
        return symmetric_limits(histogram, float(best))
    widest = low.clamp(max=0), high.clamp(min=0)
    ends = list(widest)
    for factors in (_coarse(), *[_fine()] * _TURNS):
        for side in (1, 0):
            candidates = (ends[side] * factors).clamp(*widest)
            pair = [end.expand_as(candidates) for end in ends]
            pair[side] = candidates
            ends[side] = candidates[_errors(points, pair[0], pair[1], scheme).argmin()]
    return within(float(ends[0]), low, high), within(float(ends[1]), low, high)


def _errors(
    points: tuple[Tensor, Tensor], low: Tensor, high: Tensor, scheme: TensorScheme
) -> Tensor:
    """E of each pair of limits, float64 [candidates]."""
    values, counts = points
    grid = grid_of(low, high, scheme)
    errors = []
    for start in range(0, len(low), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        zero = None if grid.zero_point is None else grid.zero_point[chunk, None]
        rounded = round_to_grid(values, grid.scale[chunk, None], zero, scheme.format)
        errors.append((rounded - values).square() @ counts.double())
    return torch.cat(errors)


def _coarse() -> Tensor:
    """Factors from 1 down, so that of equal errors the widest limit wins."""
    return torch.exp2(-torch.arange(_OCTAVES * _STEPS, dtype=torch.float64) / _STEPS)


def _fine() -> Tensor:
    """Factors from one coarse step above 1 to one below; 1 is among them."""
    return torch.exp2(-torch.arange(-_STEPS, _STEPS + 1, dtype=torch.float64) / _STEPS**2)
