"""What a rotation is trained for: losses of rotated activations, and the error of the quantizer
that will be exported.

Shapes: ``y`` ``[*batch, tokens, n]`` are rotated activations, ``weights`` ``[*batch, tokens]``
inverse inclusion probabilities of the tokens (``None``: all equal). Every loss is a weighted mean
over tokens and has shape ``[*batch]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from calib._names.moved import moved_names
from calib.errors import RotationError
from calib.rotations.quantizer import (
    ActivationScheme,
    from_groups,
    limits_of,
    lost_in_steps,
    scale_and_zero,
    to_groups,
)

ObjectiveName = Literal["auto", "whip", "lp", "kurtosis", "range", "scheme"]
OBJECTIVE_NAMES: tuple[str, ...] = get_args(ObjectiveName)

__getattr__ = moved_names(
    __name__,
    dict.fromkeys(("fake_quantize", "scheme_error", "Granularity"), "calib.rotations.quantizer"),
)

# Kurtosis of the uniform distribution, the one a uniform quantizer wastes no level on.
_UNIFORM_KURTOSIS = 1.8


@dataclass(frozen=True)
class Objective:
    """A loss with its gradient and the curvature that the monotone step needs.

    ``curvature`` is an upper bound of the second derivative of the per-entry loss, where there is
    one; ``None`` asks the optimiser to take the scale of the gradient instead and to find the rest
    by backtracking.
    """

    name: str
    per_token: Callable[[Tensor], Tensor]
    """``[*batch, tokens, n]`` to ``[*batch, tokens]``; differentiable."""
    closed_form: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """The same and the derivative of its sum, without autograd; may write to what it is given,
    unless ``curvature`` is known. ``None``: by autograd, as where one scale depends on all tokens.
    """
    reduce: Callable[[Tensor], Tensor] | None = None
    """Applied to the weighted mean over tokens."""
    curvature: float | None = None
    heads: int = 1
    """Batch elements that have to be seen together, in the last batch dimension."""
    entries: int = 1
    """Tokens that have to be seen together."""
    whole: bool = False
    """Whether all tokens have to be seen together."""

    def __call__(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss ``[*batch]`` of ``y``; differentiable."""
        return self.reduced(_token_mean(self.per_token(y), weights))

    def reduced(self, mean: Tensor) -> Tensor:
        """The loss that a mean over tokens stands for."""
        return mean if self.reduce is None else self.reduce(mean)

    def factor(self, mean: Tensor) -> Tensor:
        """The derivative of :meth:`reduced`."""
        if self.reduce is None:
            return torch.ones_like(mean)
        leaf = mean.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.reduce(leaf).sum(), leaf)
        return slope

    def with_derivative(
        self, y: Tensor, shares: Tensor | None = None, *, curvature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss of each token of ``y``, which is used up, and the derivative of their sum, weighted
        by ``shares`` ``[*batch, tokens]`` where they are given.

        With ``curvature`` ``c`` ``[*batch, 1, 1]``, of objectives that know one: the derivative of
        ``loss - c |y|^2 / 2``.
        """
        if self.closed_form is not None:
            losses, slope = self.closed_form(y)
            if curvature is not None:
                slope.addcmul_(y, curvature, value=-1)
            return losses, slope if shares is None else slope.mul_(shares.unsqueeze(-1))
        leaf = y.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.per_token(leaf)
            total = losses.sum() if shares is None else (losses * shares).sum()
            (slope,) = torch.autograd.grad(total, leaf)
        if curvature is not None:
            bend = curvature * y
            slope = slope - (bend if shares is None else bend * shares.unsqueeze(-1))
        return losses.detach(), slope

    def loss_and_gradient(self, y: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss ``[*batch]`` of ``y`` and its derivative with respect to ``y``, times the number
        of tokens.

        The factor keeps the entries at the size of one token's derivative whatever the number of
        tokens is.
        """
        shares = None if weights is None else weights / weights.mean(-1, keepdim=True)
        losses, slope = self.with_derivative(y.clone(), shares)
        mean = _token_mean(losses, weights)
        return self.reduced(mean), slope * self.factor(mean)[..., None, None]


def make_objective(
    name: ObjectiveName, *, scheme: ActivationScheme | None = None, p: float = 4.0
) -> Objective:
    """The objective called ``name``.

    * ``whip``: ``sum_c exp(-|y_c|)``, DartQuant's; pushes entries away from zero at fixed power, so
      towards a box.
    * ``lp``: ``(mean over tokens of sum_c |y_c|^p)^(1/p)``, a smooth stand-in for the largest entry
      of a static quantizer.
    * ``kurtosis``: ``|kurtosis - 1.8|`` over the channels of a token, as KurTail; 1.8 is the
      uniform distribution's.
    * ``range``: the squared scale of a per-token quantizer, relative to the token's power.
    * ``scheme``: the squared error of ``scheme`` itself, see :func:`_quantizer_loss`.
    * ``auto``: ``lp`` of exponent 4 where a scheme is named, else ``whip``. On three small models
      ``lp`` left less held-out error than the reference's Whip under static, per-token and
      per-group quantizers alike.

    Raises:
        RotationError: unknown name, no ``scheme`` for an objective that needs one, or ``p < 2``.
    """
    if name not in OBJECTIVE_NAMES:
        raise RotationError(
            f"unknown objective {name!r}", hint=f"use one of: {', '.join(OBJECTIVE_NAMES)}"
        )
    if name == "auto" and scheme is not None:
        name, p = "lp", 4.0
    if name in ("auto", "whip"):
        return Objective("whip", _whip, _whip_closed, curvature=1.0)
    if name == "lp":
        if p < 2:
            raise RotationError(
                f"p = {p} in the L_p objective", hint="use p of 2 or more, such as 4"
            )
        return Objective(
            "lp",
            lambda y: y.abs().pow(p).sum(-1),
            lambda y: _lp_closed(y, p),
            reduce=lambda mean: mean.clamp_min(1e-30).pow(1 / p),
        )
    if name == "kurtosis":
        return Objective("kurtosis", _kurtosis, _kurtosis_closed)
    if scheme is None:
        raise RotationError(
            f"objective {name!r} needs the activation scheme", hint="name a scheme, or use 'whip'"
        )
    quantizer = scheme
    whole = quantizer.granularity == "tensor"
    if name == "range":
        return Objective(
            "range",
            lambda y: _range(y, quantizer),
            None if whole else lambda y: _range_closed(y, quantizer),
            whole=whole,
        )
    return Objective(
        "scheme",
        lambda y: _quantizer_loss(y, quantizer),
        None if whole else lambda y: _quantizer_closed(y, quantizer),
        whole=whole,
    )


def whole_inputs(y: Tensor, group: int) -> Tensor:
    """Values by KV head as the tensor that a quantizer meets: all query heads of a token side by
    side.

    Args:
        y: ``[*batch, kv_heads, tokens * group, n]``; the ``group`` query heads of a token follow
            each other.
        group: query heads that share a KV head.

    Returns:
        ``[*batch, tokens, kv_heads * group * n]``, in the order in which the output projection
        reads them.
    """
    *batch, heads, entries, n = y.shape
    split = y.reshape(*batch, heads, entries // group, group, n).transpose(-4, -3)
    return split.reshape(*batch, entries // group, heads * group * n)


def over_heads(objective: Objective, heads: int, group: int) -> Objective:
    """``objective`` for values by KV head, whose token has one scale for all heads.

    ``whip`` and ``lp`` add up over entries, so that heads can be trained one by one. The others
    depend on the largest entry of the whole token; there each head reports an equal part of its
    token's loss: the sum over heads is the loss.

    Args:
        objective: of whole tokens.
        heads: KV heads of a token, the last batch dimension.
        group: query heads that share a KV head, as for :func:`whole_inputs`.
    """
    if objective.name in ("whip", "lp"):
        return objective

    def spread(losses: Tensor) -> Tensor:
        equal = losses.repeat_interleave(group, dim=-1) / heads
        return equal.unsqueeze(-2).expand(*losses.shape[:-1], heads, losses.shape[-1] * group)

    def of_tokens(y: Tensor) -> Tensor:
        # a tile comes with one batch dimension, layers and heads together
        return whole_inputs(y.reshape(-1, heads, *y.shape[-2:]), group)

    def per_token(y: Tensor) -> Tensor:
        return spread(objective.per_token(of_tokens(y))).reshape(y.shape[:-1])

    def closed_form(y: Tensor) -> tuple[Tensor, Tensor]:
        losses, slope = objective.with_derivative(of_tokens(y))
        slope *= group  # a token's loss is that of each of its entries
        return spread(losses).reshape(y.shape[:-1]), _by_head(slope, heads, group).reshape(y.shape)

    return Objective(
        objective.name,
        per_token,
        None if objective.closed_form is None else closed_form,
        heads=heads,
        entries=group,
        whole=objective.whole,
    )


def _by_head(whole: Tensor, heads: int, group: int) -> Tensor:
    """What :func:`whole_inputs` was made of."""
    *batch, tokens, _ = whole.shape
    split = whole.reshape(*batch, tokens, heads, group, -1).transpose(-4, -3)
    return split.reshape(*batch, heads, tokens * group, -1)


def _whip(y: Tensor) -> Tensor:
    return torch.exp(-y.abs()).sum(-1)


def _whip_closed(y: Tensor) -> tuple[Tensor, Tensor]:
    """Derivative ``-sign(y) exp(-|y|)``.

    At 0 the kink points up and any value in ``[-1, 1]`` serves; here it is -1. A power of two is
    what exp comes down to, and torch's is three times as fast.
    """
    decay = y.abs().mul_(-1 / math.log(2)).exp2_()
    losses = decay.sum(-1)
    return losses, decay.copysign_(y).neg_()


def _lp_closed(y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """``|y|^p`` and ``p |y|^(p - 2) y``, from ``y^2``."""
    square = y.square()
    if p == 4:  # of which this is all
        return torch.linalg.vector_norm(square, dim=-1).square_(), y.mul_(square).mul_(p)
    power = square.pow(p / 2 - 1)
    losses = square.mul_(power).sum(-1)
    return losses, power.mul_(y).mul_(p)


def _kurtosis(y: Tensor) -> Tensor:
    square = y.square()
    power = square.mean(-1).clamp_min(1e-30)
    return (square.square().mean(-1) / power.square() - _UNIFORM_KURTOSIS).abs()


def _kurtosis_closed(y: Tensor) -> tuple[Tensor, Tensor]:
    """With ``m2`` and ``m4`` the mean square and fourth power of a token of ``n`` entries, ``k = m4
    / m2^2`` and ``dk/dy = 4 y (y^2 - m4 / m2) / (n m2^2)``.
    """
    square = y.square()
    power = square.mean(-1, keepdim=True).clamp_min(1e-30)
    fourth = square.square().mean(-1, keepdim=True)
    excess = fourth / power.square() - _UNIFORM_KURTOSIS
    scale = excess.sign() * 4.0 / (y.shape[-1] * power.square())
    return excess.abs().squeeze(-1), square.sub_(fourth / power).mul_(y).mul_(scale)


def _range(y: Tensor, scheme: ActivationScheme) -> Tensor:
    """``s^2 / power`` with ``s`` the quantizer's scale: twelve times the expected relative error of
    rounding.
    """
    grouped = to_groups(y, scheme)
    scale, _ = scale_and_zero(*limits_of(grouped, scheme), scheme)
    power = y.detach().square().mean(-1).clamp_min(1e-30)
    return scale.square().expand_as(grouped[..., :1]).mean((-1, -2)) / power


def _range_closed(y: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    grouped = to_groups(y, scheme)
    low, high = limits_of(grouped, scheme)
    scale, _ = scale_and_zero(low, high, scheme)
    power = y.square().mean(-1).clamp_min(1e-30)
    factor = scale / power[..., None, None] * (2.0 / grouped.shape[-2])
    losses = scale.square().expand_as(grouped[..., :1]).mean((-1, -2)) / power
    return losses, from_groups(_through_scale(grouped, low, high, factor, scheme), y.shape)


def _quantizer_loss(y: Tensor, scheme: ActivationScheme) -> Tensor:
    """The quantizer's squared error relative to the token's power, with a straight-through estimate
    of its gradient.

    The error of an entry is ``s (round(u) - u)`` with ``u = y / s``. Its derivative through
    ``round(u) - u`` jumps from one code to the next and averages to zero, so only the scale is
    differentiated: ``loss = s^2 sum (round(u) - u)^2`` with the rounding errors held fixed (the
    estimate that LSQ, Esser et al. 2020, uses for its step size).
    """
    grouped = to_groups(y, scheme)
    scale, zero = scale_and_zero(*limits_of(grouped, scheme), scheme)
    with torch.no_grad():
        rounding = lost_in_steps(grouped, scale, zero, scheme).square_()
    power = y.detach().square().sum(-1).clamp_min(1e-30)
    return (scale.square() * rounding).sum((-1, -2)) / power


def _quantizer_closed(y: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    grouped = to_groups(y, scheme)
    low, high = limits_of(grouped, scheme)
    scale, zero = scale_and_zero(low, high, scheme)
    rounding = torch.linalg.vector_norm(
        lost_in_steps(grouped, scale, zero, scheme), dim=-1, keepdim=True
    ).square_()
    power = torch.linalg.vector_norm(y, dim=-1).square_().clamp_min_(1e-30)
    losses = (scale.square() * rounding).sum((-1, -2)) / power
    factor = 2.0 * scale * rounding / power[..., None, None]
    return losses, from_groups(_through_scale(grouped, low, high, factor, scheme), y.shape)


def _through_scale(
    grouped: Tensor, low: Tensor, high: Tensor, factor: Tensor, scheme: ActivationScheme
) -> Tensor:
    """Derivative ``[..., groups, size]`` of a loss that depends on the scales alone.

    Args:
        grouped: what is quantized.
        low: its limits, broadcastable; a limit beyond zero sets no scale.
        high: likewise.
        factor: the loss's derivative with respect to the scale of each token ``[..., groups, 1]``.
        scheme: the quantizer.
    """
    tiny = torch.finfo(low.dtype).tiny * 2.0**scheme.bits
    if scheme.symmetric:
        steps = 2 ** (scheme.bits - 1) - 1
        largest = torch.maximum(-low, high)
        factor = torch.where(largest / steps > tiny, factor / steps, 0.0)
        slope = _shared_by(grouped.abs(), largest, factor)
        return slope.mul_(torch.sign(grouped))

    steps = 2**scheme.bits - 1
    reached = (high.clamp_min(0.0) - low.clamp_max(0.0)) / steps > tiny
    factor = torch.where(reached, factor / steps, 0.0)
    slope = _shared_by(grouped.clone(), high, torch.where(high > 0, factor, 0.0))
    lower = torch.where(low < 0, -factor, 0.0)
    return slope.add_(_shared_by(grouped.clone(), low, lower))


def _shared_by(x: Tensor, limit: Tensor, slope: Tensor) -> Tensor:
    """``slope`` to the entries of ``x`` that are ``limit``, in equal parts, in its memory."""
    reached = x.eq_(limit)
    return reached.mul_(slope / reached.sum(-1, keepdim=True))


def _token_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean(-1) if weights is None else (values * weights).sum(-1) / weights.sum(-1)
