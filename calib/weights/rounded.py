"""What every weight algorithm returns, and the figure by which all of them are judged.

A linear computes ``y = x Wᵀ``. With ``dW`` the error of its weight and ``H = E[x xᵀ]`` the second
moment of its input,

    E|x dWᵀ|² = Σ_rows dw H dwᵀ = tr(dW H dWᵀ)

so the expected error of the output is known from H alone, without the tokens, and each row adds its
own part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.arithmetic.grids import Grid, dequantize, quantize
from calib.errors import QuantizationError
from calib.schemes import PerBlock, PerChannel, TensorScheme


@dataclass(frozen=True)
class Rounded:
    """A quantized weight.

    Attributes:
        stored: the stored values ``[out, in]``, as :func:`calib.arithmetic.grids.quantize` makes
            them.
        grid: what they stand for.
        order: int64 ``[in]`` where the groups follow another order of the input features: column
            ``p`` of ``stored`` is input feature ``order[p]``, so that the linear computes ``x[...,
            order] storedᵀ``. Else ``None``.
    """

    stored: Tensor
    grid: Grid
    order: Tensor | None = None

    def values(self, scheme: TensorScheme) -> Tensor:
        """The float32 weight ``[out, in]`` that it stands for, its columns in the order of the
        input features.
        """
        values = dequantize(self.stored, self.grid, scheme)
        return values if self.order is None else values[:, self.order.argsort()]


def on_grid(weight: Tensor, grid: Grid, scheme: TensorScheme) -> Rounded:
    """``weight`` [out, in] rounded to the nearest values of ``grid``."""
    return Rounded(quantize(weight, grid, scheme), grid)


def output_error(weight: Tensor, dequantized: Tensor, moment: Tensor) -> float:
    """Relative squared error of a linear's output, ``tr(dW H dWᵀ) / tr(W H Wᵀ)``; 0 where nothing
    comes out anyway.

    Args:
        weight: float ``[out, in]``.
        dequantized: what it was rounded to, the same shape.
        moment: ``H = E[x xᵀ]`` of its input, ``[in, in]``.
    """
    reference = float(row_errors(weight, torch.zeros_like(weight), moment).sum())
    return (
        float(row_errors(weight, dequantized, moment).sum()) / reference if reference > 0 else 0.0
    )


def row_errors(weight: Tensor, dequantized: Tensor, moment: Tensor) -> Tensor:
    """``dw H dwᵀ`` of each row: float64 ``[out]``. The product is taken in float32, its sum over
    columns in float64.
    """
    difference = dequantized.float() - weight.float()
    return ((difference @ moment.float()) * difference).sum(dim=1, dtype=torch.float64)


def keep_best(
    weight: Tensor, moment: Tensor, scheme: TensorScheme, candidates: Sequence[Rounded]
) -> Rounded:
    """Of several roundings of one weight, the one with the least output error; the earlier one
    where they tie.

    Rows are chosen one by one where each has scales of its own, and all at once where they share
    one scale.
    """
    best = candidates[0]
    error = row_errors(weight, best.values(scheme), moment)
    by_row = isinstance(scheme.granularity, PerBlock) or scheme.granularity == PerChannel(0)
    for candidate in candidates[1:]:
        found = row_errors(weight, candidate.values(scheme), moment)
        if by_row:
            better = found < error
            best = _choose_rows(better, candidate, best)
            error = torch.where(better, found, error)
        elif found.sum() < error.sum():
            best, error = candidate, found
    return best


def check_moment(weight: Tensor, moment: Tensor) -> Tensor:
    """``moment`` on the device of ``weight``.

    Raises:
        QuantizationError: it is not ``[in, in]``, or holds NaN or Inf.
    """
    width = weight.shape[1]
    if moment.shape != (width, width):
        raise QuantizationError(
            f"a weight of shape {list(weight.shape)} needs a second moment [{width}, {width}], not"
            f" {list(moment.shape)}"
        )
    if not bool(torch.isfinite(moment).all()):
        raise QuantizationError(
            "the second moment of a linear's input holds NaN or Inf",
            hint="The model overflows in this dtype: try --dtype bfloat16 or float32.",
        )
    return moment.to(weight.device)


def _choose_rows(first: Tensor, one: Rounded, other: Rounded) -> Rounded:
    """Rows of ``one`` where ``first`` [out] says so, else of ``other``. Both have the same order
    and second level.
    """

    def choose(a: Tensor, b: Tensor) -> Tensor:
        rows = first.reshape(-1, *([1] * (a.dim() - 1)))
        if a.element_size() == 1:  # float8 has no torch.where; its bytes do
            return torch.where(rows, a.view(torch.uint8), b.view(torch.uint8)).view(a.dtype)
        return torch.where(rows, a, b)

    zero = None
    if one.grid.zero_point is not None and other.grid.zero_point is not None:
        zero = choose(one.grid.zero_point, other.grid.zero_point)
    grid = Grid(choose(one.grid.scale, other.grid.scale), zero, other.grid.second_level)
    return Rounded(choose(one.stored, other.stored), grid, other.order)
