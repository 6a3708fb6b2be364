"""The integer quantizer of activations that rotations are trained for, and the error it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from calib.arithmetic.tiles import rows_at_once
from calib.errors import RotationError

Granularity = Literal["tensor", "token", "group"]


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
    grouped = to_groups(x, scheme)
    low, high = limits_of(grouped, scheme) if limits is None else limits
    scale, zero = scale_and_zero(low, high, scheme)
    codes = torch.round(grouped / scale) + zero
    codes = codes.clamp(*code_limits(scheme))
    return from_groups((codes - zero) * scale, x.shape)


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
    if limits is None and scheme.granularity == "tensor":
        limits = (x.amin((-1, -2))[..., None, None, None], x.amax((-1, -2))[..., None, None, None])
    at_once = max(1, rows_at_once(x) // max(1, x.shape[:-2].numel()))
    lost, kept = torch.zeros(2, *x.shape[:-2], dtype=torch.float64, device=x.device)
    for begin in range(0, x.shape[-2], at_once):
        tile = x[..., begin : begin + at_once, :]
        error = (fake_quantize(tile, scheme, limits=limits) - tile).double().square().sum(-1)
        power = tile.double().square().sum(-1)
        if weights is not None:
            share = weights[..., begin : begin + at_once]
            error, power = error * share, power * share
        lost += error.sum(-1)
        kept += power.sum(-1)
    return torch.where(kept > 0, lost / kept.clamp_min(torch.finfo(kept.dtype).tiny), 0.0)


def lost_in_steps(grouped: Tensor, scale: Tensor, zero: Tensor, scheme: ActivationScheme) -> Tensor:
    """``round(u) - u`` for ``u = y / s``, where the scales ``s`` are those of ``y`` itself.

    Codes then only saturate where the zero point is rounded.
    """
    u = grouped / scale
    codes = torch.round(u)
    if not scheme.symmetric:
        least, most = code_limits(scheme)
        codes.clamp_(least - zero, most - zero)
    return codes.sub_(u)


def code_limits(scheme: ActivationScheme) -> tuple[int, int]:
    """Least and greatest code."""
    least = -(2 ** (scheme.bits - 1)) if scheme.symmetric else 0
    return least, least + 2**scheme.bits - 1


def to_groups(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """``[*batch, tokens, groups, size]``: one group but for granularity ``group``, zero-padded to
    whole groups.
    """
    if scheme.granularity != "group":
        return x.unsqueeze(-2)
    padding = -x.shape[-1] % scheme.group_size
    padded = torch.nn.functional.pad(x, (0, padding))
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // scheme.group_size, scheme.group_size)


def from_groups(grouped: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`to_groups` was given, of this shape."""
    return grouped.flatten(-2)[..., : shape[-1]]


def limits_of(grouped: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Least and greatest entry of each quantization group, broadcastable against ``grouped``."""
    dims = (-1, -2, -3) if scheme.granularity == "tensor" else (-1,)
    return grouped.amin(dims, keepdim=True), grouped.amax(dims, keepdim=True)


def scale_and_zero(low: Tensor, high: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Scale (positive even for an all-zero group) and integer zero point (0 when symmetric)."""
    tiny = torch.finfo(low.dtype).tiny * 2.0**scheme.bits
    if scheme.symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / (2 ** (scheme.bits - 1) - 1)
        return scale.clamp_min(tiny), torch.zeros_like(scale)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / (2**scheme.bits - 1)).clamp_min(tiny)
    return scale, torch.round(-low / scale).detach()
