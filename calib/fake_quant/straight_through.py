"""Rounding with gradients.

Rounding has a derivative of zero wherever it has one. A straight-through estimator (Bengio et al.,
2013) takes it for the identity where the value lies on the grid's range, and for a constant where
it was clipped:

    dQ(x)/dx = 1 if qmin <= round(x / s) + z <= qmax else 0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calib.arithmetic.grids import round_to_grid
from calib.schemes import NumberFormat


def round_straight_through(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: NumberFormat
) -> Tensor:
    """:func:`calib.arithmetic.grids.round_to_grid` in float32, with a gradient for ``x`` alone;
    returns its dtype.
    """
    result: Tensor = _Round.apply(x, scale, zero_point, fmt)  # type: ignore[no-untyped-call]
    return result


def replace_straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, with the gradient of ``x``."""
    result: Tensor = _Replace.apply(x, value)  # type: ignore[no-untyped-call]
    return result


def round_learned_step(x: Tensor, step: Tensor, fmt: NumberFormat, gradient_scale: float) -> Tensor:
    """Symmetric rounding with a gradient for the step too (LSQ: Esser et al., "Learned step size
    quantization", 2020).

        dQ(x)/ds = g (round(x / s) - x / s)   within the range,   g qmin below it,   g qmax above it

    Args:
        x: any shape.
        step: broadcastable against ``x``, positive.
        fmt: an integer format.
        gradient_scale: g.
    """
    apply = _RoundLearnedStep.apply
    result: Tensor = apply(x, step, fmt, gradient_scale)  # type: ignore[no-untyped-call]
    return result


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: NumberFormat
    ) -> Tensor:
        # rounded, or rounding errors would cut off the value that set the limit
        code = (x.float() / scale).round()
        if zero_point is not None:
            code = code + zero_point
        ctx.save_for_backward((code >= fmt.qmin) & (code <= fmt.qmax))
        return round_to_grid(x.float(), scale, zero_point, fmt).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _RoundLearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, fmt: NumberFormat, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.fmt, ctx.gradient_scale = fmt, gradient_scale
        return round_to_grid(x.float(), step, None, fmt).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, step = ctx.saved_tensors
        ratio = x.float() / step
        inside = (ratio >= ctx.fmt.qmin) & (ratio <= ctx.fmt.qmax)
        slope = ratio.clamp(ctx.fmt.qmin, ctx.fmt.qmax).round() - torch.where(inside, ratio, 0.0)
        of_step = (gradients[0].float() * slope).sum_to_size(step.shape) * ctx.gradient_scale
        return gradients[0] * inside, of_step, None, None
