"""What a rotation is trained for: losses of rotated activations, and the error of the quantizer
that will be exported.

Shapes: ``y`` ``[*batch, tokens, n]`` are rotated activations, ``weights`` ``[*batch, tokens]``
inverse inclusion probabilities of the tokens (``None``: all equal). Every loss is a weighted mean
over tokens and has shape ``[*batch]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from calib.errors import RotationError

ObjectiveName = Literal["auto", "whip", "lp", "kurtosis", "range", "scheme"]
OBJECTIVE_NAMES: tuple[str, ...] = get_args(ObjectiveName)
Granularity = Literal["tensor", "token", "group"]

# Kurtosis of the uniform distribution, the one a uniform quantizer wastes no level on.
_UNIFORM_KURTOSIS = 1.8


@dataclass(frozen=True)
class ActivationScheme:
    """How one activation is quantized to integers.

    ``amax / qmax`` with ``qmax = 2^(bits-1) - 1``, codes clamped to ``-2^(bits-1) ... 2^(bits-1) -
    1``, when symmetric; else ``(max - min) / (2^bits - 1)`` over a range that includes zero, with
    an integer zero point.
    """

    bits: int = 4
    """Bits of the integer, 2 to 16."""
    symmetric: bool = True
    """Without (``True``) or with a zero point."""
    granularity: Granularity = "token"
    """One scale for the whole tensor (static), one per token, or one per group of channels of a
    token.
    """
    group_size: int = 128
    """Channels per group; the last group may be smaller. Read by granularity ``group`` only."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise RotationError(f"{self.bits} bits per activation", hint="use 2 to 16 bits")
        if self.granularity not in get_args(Granularity):
            raise RotationError(
                f"unknown granularity {self.granularity!r}",
                hint=f"use one of: {', '.join(get_args(Granularity))}",
            )
        if self.group_size < 1:
            raise RotationError(
                f"group size {self.group_size}", hint="use a group of 1 channel or more"
            )


def fake_quantize(
    x: Tensor, scheme: ActivationScheme, *, limits: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``x`` after quantization and dequantization, of the same shape and dtype.

    Args:
        x: activations ``[*batch, tokens, n]``.
        scheme: the quantizer; granularity ``tensor`` means one scale for each batch element.
        limits: calibrated ``(min, max)``, broadcastable against ``x``, instead of those of ``x``.
    """
    grouped = _to_groups(x, scheme)
    low, high = _limits(grouped, scheme) if limits is None else limits
    scale, zero = _scale_and_zero(low, high, scheme)
    codes = torch.round(grouped / scale) + zero
    least = -(2 ** (scheme.bits - 1)) if scheme.symmetric else 0
    codes = codes.clamp(least, least + 2**scheme.bits - 1)
    return _from_groups((codes - zero) * scale, x.shape)


def scheme_error(
    x: Tensor,
    scheme: ActivationScheme,
    *,
    weights: Tensor | None = None,
    limits: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Relative squared error ``sum |x - quantized(x)|^2 / sum |x|^2``; 0 where ``x`` is all zero.

    Args:
        x: rotated activations ``[*batch, tokens, n]``.
        scheme: the quantizer that will be exported.
        weights: token weights ``[*batch, tokens]``.
        limits: calibrated ``(min, max)`` of a static quantizer, broadcastable against ``x``; by
            default those of ``x``.

    Returns:
        Float64 tensor ``[*batch]``.
    """
    lost = (fake_quantize(x, scheme, limits=limits) - x).double().square().sum(-1)
    kept = x.double().square().sum(-1)
    if weights is not None:
        lost, kept = lost * weights, kept * weights
    power = kept.sum(-1)
    return torch.where(
        power > 0, lost.sum(-1) / power.clamp_min(torch.finfo(power.dtype).tiny), 0.0
    )


@dataclass(frozen=True)
class Objective:
    """A loss with its gradient and the curvature that the monotone step needs.

    ``curvature`` is an upper bound of the second derivative of the per-entry loss, where there is
    one; ``None`` asks the optimiser to take the scale of the gradient instead and to find the rest
    by backtracking.
    """

    name: str
    per_token: Callable[[Tensor], Tensor]
    """``[*batch, tokens, n]`` to ``[*batch, tokens]``."""
    reduce: Callable[[Tensor], Tensor] | None = None
    """Applied to the weighted mean over tokens."""
    curvature: float | None = None

    def __call__(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss ``[*batch]`` of ``y``; differentiable."""
        loss = _token_mean(self.per_token(y), weights)
        return loss if self.reduce is None else self.reduce(loss)

    def loss_and_gradient(self, y: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss ``[*batch]`` and its derivative with respect to ``y``, times the number of
        tokens.

        The factor keeps the entries at the size of one token's derivative whatever the number of
        tokens is.
        """
        if self.name == "whip":
            return _whip_and_gradient(y, weights)
        leaf = y.detach().requires_grad_()
        with torch.enable_grad():
            loss = self(leaf, weights)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), gradient * y.shape[-2]


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
        return Objective("whip", _whip, curvature=1.0)
    if name == "lp":
        if p < 2:
            raise RotationError(
                f"p = {p} in the L_p objective", hint="use p of 2 or more, such as 4"
            )
        return Objective(
            "lp",
            lambda y: y.abs().pow(p).sum(-1),
            reduce=lambda mean: mean.clamp_min(1e-30).pow(1 / p),
        )
    if name == "kurtosis":
        return Objective("kurtosis", _kurtosis)
    if scheme is None:
        raise RotationError(
            f"objective {name!r} needs the activation scheme", hint="name a scheme, or use 'whip'"
        )
    quantizer = scheme
    if name == "range":
        return Objective("range", lambda y: _range(y, quantizer))

    return Objective("scheme", lambda y: _quantizer_loss(y, quantizer))


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


def over_heads(objective: Objective, group: int) -> Objective:
    """``objective`` for values by KV head, whose token has one scale for all heads.

    ``whip`` and ``lp`` add up over entries, so that heads can be trained one by one. The others
    depend on the largest entry of the whole token; there each head reports an equal part of its
    token's loss: the sum over heads is the loss.

    Args:
        objective: of whole tokens.
        group: query heads that share a KV head, as for :func:`whole_inputs`.
    """
    if objective.name in ("whip", "lp"):
        return objective

    def per_token(y: Tensor) -> Tensor:
        heads = y.shape[-3]
        loss = objective.per_token(whole_inputs(y, group)).repeat_interleave(group, dim=-1)
        return (loss / heads).unsqueeze(-2).expand(y.shape[:-1])

    return Objective(objective.name, per_token)


def _whip(y: Tensor) -> Tensor:
    return torch.exp(-y.abs()).sum(-1)


def _whip_and_gradient(y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Closed form ``-sign(y) exp(-|y|)`` in one buffer: memory traffic dominates at small ``n``,
    memory at large.

    At 0 the kink points up and any value in ``[-1, 1]`` serves; here it is -1.
    """
    decay = y.abs().neg_().exp_()
    loss = _token_mean(decay.sum(-1), weights)
    gradient = decay.copysign_(y).neg_()
    if weights is not None:
        gradient *= (weights / weights.mean(-1, keepdim=True)).unsqueeze(-1)
    return loss, gradient


def _kurtosis(y: Tensor) -> Tensor:
    square = y.square()
    power = square.mean(-1).clamp_min(1e-30)
    return (square.square().mean(-1) / power.square() - _UNIFORM_KURTOSIS).abs()


def _range(y: Tensor, scheme: ActivationScheme) -> Tensor:
    """``s^2 / power`` with ``s`` the quantizer's scale: twelve times the expected relative error of
    rounding.
    """
    grouped = _to_groups(y, scheme)
    scale, _ = _scale_and_zero(*_limits(grouped, scheme), scheme)
    power = y.detach().square().mean(-1).clamp_min(1e-30)
    return scale.square().expand_as(grouped[..., :1]).mean((-1, -2)) / power


def _quantizer_loss(y: Tensor, scheme: ActivationScheme) -> Tensor:
    """The quantizer's squared error relative to the token's power, with a straight-through estimate
    of its gradient.

    The error of an entry is ``s (round(u) - u)`` with ``u = y / s``. Its derivative through
    ``round(u) - u`` jumps from one code to the next and averages to zero, so only the scale is
    differentiated: ``loss = s^2 sum (round(u) - u)^2`` with the rounding errors held fixed (the
    estimate that LSQ, Esser et al. 2020, uses for its step size).
    """
    grouped = _to_groups(y, scheme)
    scale, zero = _scale_and_zero(*_limits(grouped, scheme), scheme)
    with torch.no_grad():
        u = grouped / scale
        least = -(2 ** (scheme.bits - 1)) if scheme.symmetric else 0
        rounding = (
            (torch.round(u) + zero).clamp(least, least + 2**scheme.bits - 1) - zero - u
        ).square()
    power = y.detach().square().sum(-1).clamp_min(1e-30)
    return (scale.square() * rounding).sum((-1, -2)) / power


def _token_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean(-1) if weights is None else (values * weights).sum(-1) / weights.sum(-1)


def _to_groups(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """``[*batch, tokens, groups, size]``: one group but for granularity ``group``, zero-padded to
    whole groups.
    """
    if scheme.granularity != "group":
        return x.unsqueeze(-2)
    padding = -x.shape[-1] % scheme.group_size
    padded = torch.nn.functional.pad(x, (0, padding))
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // scheme.group_size, scheme.group_size)


def _from_groups(grouped: Tensor, shape: torch.Size) -> Tensor:
    return grouped.flatten(-2)[..., : shape[-1]]


def _limits(grouped: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Least and greatest entry of each quantization group, broadcastable against ``grouped``."""
    dims = (-1, -2, -3) if scheme.granularity == "tensor" else (-1,)
    return grouped.amin(dims, keepdim=True), grouped.amax(dims, keepdim=True)


def _scale_and_zero(low: Tensor, high: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Scale (positive even for an all-zero group) and integer zero point (0 when symmetric)."""
    tiny = torch.finfo(low.dtype).tiny * 2.0**scheme.bits
    if scheme.symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / (2 ** (scheme.bits - 1) - 1)
        return scale.clamp_min(tiny), torch.zeros_like(scale)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / (2**scheme.bits - 1)).clamp_min(tiny)
    return scale, torch.round(-low / scale).detach()
