"""Round to nearest, and the search for limits inside the range of a weight that lose less than its
full range does.

Shrinking the limits of a group by a ratio r makes the steps finer, and clips what lies outside. The
best r minimises

    Σ_j h_j (w_j - round(w_j; r))²        h = 1, or the diagonal of the second moment H of the input

over the group. With the diagonal of H it is the output error if input features were uncorrelated; H
itself couples the columns of all groups of a row. Ratios above 1 are tried for floating-point
formats, whose steps differ by binade: with E2M1, a largest element put at 4 instead of 6 leaves
finer steps below it.

Where scales are stored in a format of their own (E4M3, powers of two), each candidate is rounded to
it before it is judged, so the best one is one that can be stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.arithmetic.grids import (
    Grid,
    expand_grid,
    grid_of,
    round_to_grid,
    two_level_grid,
    weight_grid,
    weight_limits,
)
from calib.schemes import Granularity, NumberFormat, PerBlock, PerChannel, TensorScheme
from calib.weights.rounded import Rounded, check_moment, on_grid

_STEP = 0.05
_FINE = 0.01


def rtn(
    weight: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype = torch.float32,
    *,
    amax: Tensor | None = None,
) -> Rounded:
    """Round ``weight`` [out, in] to the nearest values of the grid that just covers it.

    Args:
        weight: any float dtype.
        scheme: format and granularity.
        dtype: dtype of the scales.
        amax: ``[]``, sets the second level of two-level scales; by default the largest magnitude of
            ``weight``.
    """
    weight = weight.detach().float()
    if amax is None:
        return on_grid(weight, weight_grid(weight, scheme, dtype), scheme)
    return on_grid(
        weight, shrunk_grid(*weight_limits(weight, scheme.granularity), scheme, dtype, amax), scheme
    )


def mse(
    weight: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype = torch.float32,
    *,
    moment: Tensor | None = None,
    amax: Tensor | None = None,
) -> Rounded:
    """Round ``weight`` [out, in] to the nearest values of the grid with the least squared error,
    group by group.

    Args:
        weight: any float dtype.
        scheme: format and granularity.
        dtype: dtype of the scales.
        moment: ``E[x xᵀ]`` of the input ``[in, in]``: each column's error counts by its diagonal;
            by default all alike.
        amax: as for :func:`rtn`.

    Raises:
        QuantizationError: ``moment`` does not fit, or holds NaN or Inf.
    """
    weight = weight.detach().float()
    importance = None if moment is None else check_moment(weight, moment).diagonal()
    return on_grid(
        weight, clip_grid(weight, scheme, dtype, importance=importance, amax=amax), scheme
    )


def clip_grid(
    weight: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype = torch.float32,
    *,
    importance: Tensor | None = None,
    amax: Tensor | None = None,
) -> Grid:
    """The grid of :func:`mse`; never one with a larger error than
    :func:`calib.arithmetic.grids.weight_grid` has.

    Args:
        weight: float32 ``[out, in]``.
        scheme: format and granularity.
        dtype: dtype of the scales.
        importance: ``[in]``, what the squared error of a column counts; by default all alike.
        amax: ``[]``, sets the second level of two-level scales; by default the largest magnitude of
            ``weight``.
    """
    low, high = weight_limits(weight, scheme.granularity)
    amax = weight.abs().max() if amax is None else amax
    counts = None if importance is None else importance.float()

    def error(ratio: Tensor) -> Tensor:
        grid = shrunk_grid(low * ratio, high * ratio, scheme, dtype, amax)
        rounded = round_to_grid(
            weight, *expand_grid(grid, weight.shape, scheme.granularity), scheme.format
        )
        squares = (rounded - weight).square_()
        return _group_sums(squares if counts is None else squares.mul_(counts), scheme.granularity)

    best = torch.ones_like(low)
    least = error(best)
    for offsets in (_coarse(scheme.format), _fine()):
        centre = best
        for offset in offsets:
            ratio = centre + offset
            found = error(ratio)
            best = torch.where(found < least, ratio, best)
            least = torch.minimum(found, least)
    return shrunk_grid(low * best, high * best, scheme, dtype, amax)


def shrunk_grid(
    low: Tensor, high: Tensor, scheme: TensorScheme, dtype: torch.dtype, amax: Tensor
) -> Grid:
    """:func:`calib.arithmetic.grids.grid_of`, with the second level of two-level scales set by
    ``amax`` of the whole tensor.
    """
    if scheme.scale_format == "e4m3":
        return two_level_grid(torch.maximum(low.abs(), high.abs()), amax, scheme.format)
    return grid_of(low, high, scheme, dtype)


def _coarse(fmt: NumberFormat) -> list[float]:
    """Offsets from ratio 1: down to 0.2 for integers; for floats 0.5 to 1.6, an octave and what
    saturation may gain.
    """
    below, above = (-16, 0) if fmt.kind == "integer" else (-10, 12)
    return [step * _STEP for step in range(below, above + 1) if step]


def _fine() -> list[float]:
    reach = round(_STEP / _FINE) - 1
    return [step * _FINE for step in range(-reach, reach + 1) if step]


def _group_sums(values: Tensor, granularity: Granularity) -> Tensor:
    """Sums of ``values`` [out, in] over each group that shares a scale, in the shape of the
    scale.
    """
    match granularity:
        case PerChannel(axis):
            return values.sum(dim=1 - axis)
        case PerBlock(size):
            padded = torch.nn.functional.pad(values, (0, -values.shape[1] % size))
            return padded.reshape(values.shape[0], -1, size).sum(dim=-1)
        case _:
            return values.sum()
