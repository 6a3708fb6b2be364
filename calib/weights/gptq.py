"""GPTQ: round the columns of a weight one after the other, and let those to come make up for each
one's error.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2022. With ``H = E[x xᵀ] + d I`` and the upper triangular U of ``H⁻¹ = Uᵀ
U``, rounding column i of a row w and minimising ``dw H dwᵀ`` over the columns that are still free
gives

    e = (w_i - round(w_i)) / U_ii,        w_j ← w_j - e U_ij   for j > i

The error of the whole row is then ``dw = e U``, and as ``U H Uᵀ = I``, what it costs is ``dw H dwᵀ
= Σ_i e_i²``. So where the limits of a group are searched, the squared error of column i counts ``1
/ U_ii²``: the part of its input that the columns to come cannot make up for.

U comes from one Cholesky factorisation, without an inverse: let J reverse the order of the columns
and ``J H J = L Lᵀ``. Then ``R = J L J`` is upper triangular, ``H = R Rᵀ``, and so ``H⁻¹ = R⁻ᵀ R⁻¹``
and ``U = R⁻¹``.

Updates are applied column by column within a block of columns, and at once, as a matrix product, to
all that follow.

Act-order rounds the columns with the largest E[x²] first, while many are left to make up for them.
The groups that share a scale stay those of neighbouring input features unless ``static_groups`` is
off.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from calib.arithmetic.grids import Grid, expand_grid, round_to_grid, weight_limits
from calib.errors import QuantizationError
from calib.schemes import NumberFormat, PerBlock, TensorScheme
from calib.weights.clip import clip_grid, rtn, shrunk_grid
from calib.weights.rounded import Rounded, check_moment, keep_best, on_grid


def gptq(
    weight: Tensor,
    moment: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype = torch.float32,
    *,
    act_order: bool = True,
    static_groups: bool = True,
    block: int = 128,
    damping: float = 0.01,
    clip: bool = True,
    amax: Tensor | None = None,
) -> Rounded:
    """Quantize ``weight`` [out, in] by GPTQ.

    Scales per tensor and per channel are those of the weight. Scales per block are too with
    ``act_order`` and ``static_groups``; otherwise each group's are taken from its compensated
    weights when its first column is reached.

    A row whose output error comes out larger than that of rounding to nearest, with searched limits
    or on the grid that just covers the weight, is rounded to nearest instead (all rows or none
    where they share one scale). Columns whose input is always zero are rounded to nearest: they
    neither cause an error nor make up for one.

    Args:
        weight: any float dtype.
        moment: ``E[x xᵀ]`` of the input, ``[in, in]``; may be singular if ``damping`` is positive.
        scheme: format and granularity.
        dtype: dtype of the scales.
        act_order: round the columns in descending order of E[x²].
        static_groups: with ``act_order`` and scales per block, groups of neighbouring input
            features. Off: groups of features that are next to each other in the order of rounding;
            the result then has an ``order``.
        block: columns that are updated one by one; does not change the result beyond rounding.
        damping: multiple of the mean E[x²] that is added to the diagonal of ``moment``; at least 0.
        clip: search the limits of each group; otherwise they just cover its weights.
        amax: ``[]``, sets the second level of two-level scales; by default the largest magnitude of
            ``weight``.

    Raises:
        QuantizationError: ``moment`` does not fit, holds NaN or Inf, or is singular and ``damping``
            is too small.
    """
    weight = weight.detach().float()
    moment = check_moment(weight, moment)
    amax = weight.abs().max() if amax is None else amax
    order = moment.diagonal().argsort(descending=True, stable=True) if act_order else None
    if order is not None and not static_groups and isinstance(scheme.granularity, PerBlock):
        weight, moment = weight[:, order], moment[order][:, order]
        return replace(
            _gptq(weight, moment, scheme, dtype, None, block, damping, clip, amax), order=order
        )
    return _gptq(weight, moment, scheme, dtype, order, block, damping, clip, amax)


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """The upper triangular U with ``Uᵀ U = (H + d I)⁻¹``, where d is ``damping`` times the mean of
    the diagonal of H.

    A column whose input is always zero couples to none; where nothing is added to its diagonal, it
    is taken to be 1.

    Args:
        moment: H, ``[n, n]``, symmetric.
        damping: at least 0.

    Returns:
        ``[n, n]`` float64. Three matrices of that size are held at once, beside ``moment``.

    Raises:
        QuantizationError: the damped moment is not positive definite.
    """
    damped = moment.flip(0, 1).double()  # J H J; flip copies
    diagonal = damped.diagonal()
    diagonal.add_(damping * diagonal.mean())
    diagonal.masked_fill_(diagonal == 0, 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise QuantizationError(
            f"the second moment of a linear's input is singular with damping {damping:g}",
            hint=(
                "Raise the damping (gptq:damping=0.05, say), or use more calibration rows"
                " (--nsamples)."
            ),
        )
    del damped, diagonal
    upper = lower.flip(0, 1)
    del lower
    identity = torch.eye(len(upper), dtype=torch.float64, device=upper.device)
    factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return factor


def _gptq(
    weight: Tensor,
    moment: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype,
    order: Tensor | None,
    block: int,
    damping: float,
    clip: bool,
    amax: Tensor,
) -> Rounded:
    """:func:`gptq` of checked float32 arguments; ``order`` is that of rounding, ``None`` the
    columns' own.
    """
    columns = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    factor = inverse_factor(moment[columns][:, columns], damping)
    nearest = [rtn(weight, scheme, dtype, amax=amax)]
    importance = None
    if clip:
        importance = torch.empty_like(factor.diagonal()).index_copy_(
            0, columns, factor.diagonal() ** -2
        )
        grid = clip_grid(weight, scheme, dtype, importance=importance, amax=amax)
        nearest.append(on_grid(weight, grid, scheme))

    groups: _FixedGroups | _MovingGroups
    if order is None and isinstance(scheme.granularity, PerBlock):
        groups = _MovingGroups(amax, scheme, scheme.granularity.size, dtype, importance)
        # a group's columns must all be up to date when it starts
        block = max(block // groups.size, 1) * groups.size
    else:
        groups = _FixedGroups(nearest[-1].grid, weight, scheme, order)
    work = weight.T[columns].contiguous()
    _compensate(work, factor.float(), groups, scheme.format, block)
    values = work[columns.argsort()].T.contiguous()
    return keep_best(weight, moment, scheme, [*nearest, on_grid(values, groups.grid(), scheme)])


def _compensate(
    columns: Tensor,
    factor: Tensor,
    groups: _FixedGroups | _MovingGroups,
    fmt: NumberFormat,
    block: int,
) -> None:
    """Round ``columns`` [in, out], a contiguous transposed weight, in place; ``factor`` is U in
    float32.
    """
    for start in range(0, len(columns), block):
        end = min(start + block, len(columns))
        errors = torch.empty_like(columns[start:end])
        for i in range(start, end):
            rounded = round_to_grid(columns[i], *groups.scales(columns, i), fmt)
            errors[i - start] = (columns[i] - rounded) / factor[i, i]
            columns[i] = rounded
            columns[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - start], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)


class _FixedGroups:
    """Scales that are known before any column is rounded."""

    def __init__(
        self, grid: Grid, weight: Tensor, scheme: TensorScheme, order: Tensor | None
    ) -> None:
        self._grid = grid
        scale, zero = expand_grid(grid, weight.shape, scheme.granularity)
        self._scale = _by_column(scale, weight.shape, order)
        self._zero = None if zero is None else _by_column(zero, weight.shape, order)

    def scales(self, columns: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point ``[out]`` of column ``index`` of ``columns`` [in, out]."""
        return self._scale[index], None if self._zero is None else self._zero[index]

    def grid(self) -> Grid:
        """The grid of the whole weight, its columns in the order of the input features."""
        return self._grid


class _MovingGroups:
    """Scales of blocks that are taken from the weights as they stand when the first column of a
    block is reached.
    """

    def __init__(
        self,
        amax: Tensor,
        scheme: TensorScheme,
        size: int,
        dtype: torch.dtype,
        importance: Tensor | None,
    ) -> None:
        self.size = size
        self._scheme = scheme
        self._dtype = dtype
        self._importance = importance
        self._amax = amax
        self._grids: list[Grid] = []

    def scales(self, columns: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point ``[out]`` of column ``index`` of ``columns`` [in, out], asked for in
        ascending order.
        """
        if index % self.size == 0:
            group = slice(index, index + self.size)
            self._grids.append(self._search(columns[group].T, group))
        scale, zero = expand_grid(
            self._grids[-1], torch.Size((columns.shape[1], 1)), self._scheme.granularity
        )
        return scale.squeeze(1), None if zero is None else zero.squeeze(1)

    def _search(self, weight: Tensor, group: slice) -> Grid:
        if self._importance is None:
            return shrunk_grid(
                *weight_limits(weight, self._scheme.granularity),
                self._scheme,
                self._dtype,
                self._amax,
            )
        importance = self._importance[group]
        return clip_grid(weight, self._scheme, self._dtype, importance=importance, amax=self._amax)

    def grid(self) -> Grid:
        """The grid of the whole weight."""
        scale = torch.cat([grid.scale for grid in self._grids], dim=1)
        zeros = [grid.zero_point for grid in self._grids if grid.zero_point is not None]
        return Grid(scale, torch.cat(zeros, dim=1) if zeros else None, self._grids[0].second_level)


def _by_column(values: Tensor, shape: torch.Size, order: Tensor | None) -> Tensor:
    """Values that broadcast against a weight of ``shape`` [out, in], as ``[in, out]`` in the order
    of rounding.
    """
    columns = values.expand(shape).T
    return columns if order is None else columns[order]
