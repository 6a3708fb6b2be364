"""Tokens that rotations are trained on: checks, power, and second moment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.errors import RotationError

_CHUNK = 8192  # tokens widened to float64 at a time


@dataclass(frozen=True)
class Tokens:
    """Float32 tokens ``[*batch, tokens, n]`` and their weights ``[*batch, tokens]``, where they are
    not all equal.
    """

    x: Tensor
    weights: Tensor | None


def second_moment(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """``E[x^T x]`` ``[*batch, n, n]`` in float64.

    Args:
        x: activations ``[*batch, tokens, n]``.
        weights: token weights ``[*batch, tokens]``; ``None``: all equal.
    """
    share = torch.ones(x.shape[:-1]).to(x) if weights is None else weights
    share = (share.double() / share.double().sum(-1, keepdim=True)).unsqueeze(-1)
    moment = torch.zeros(
        *x.shape[:-2], x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device
    )
    # a float64 copy of all tokens may not fit where the tokens do
    for begin in range(0, x.shape[-2], _CHUNK):
        wide = x[..., begin : begin + _CHUNK, :].double()
        moment += wide.mT @ (share[..., begin : begin + _CHUNK, :] * wide)
    return moment


def at_unit_power(x: Tensor, samples: Tensor, group: int | None, *, by_token: bool) -> Tensor:
    """``x`` in float32, divided by a root mean square: where that is zero, unchanged.

    Args:
        x: activations ``[*batch, tokens, n]``.
        samples: activations of the same layout, whose power is made one unless ``by_token``.
        group: ``None``: each batch element by itself; else the last batch dimension, the KV heads,
            shares one.
        by_token: make the power of each token of ``x`` one, all heads and its ``group`` entries
            together.
    """
    x = x.float()
    if group is None or not by_token:
        return x / _unit_power(samples, (-2, -1) if group is None else (-3, -2, -1))
    *batch, entries, n = x.shape
    tokens = x.reshape(*batch, entries // group, group, n)
    return (tokens / _unit_power(tokens, (-4, -2, -1))).reshape(x.shape)


def _unit_power(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Root mean square over ``dims``, which stay as 1 (float32); 1 where it is zero."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float64)
    power = (norm / math.sqrt(math.prod(x.shape[dim] for dim in dims))).float()
    return torch.where(power > 0, power, 1.0)


def check_samples(
    samples: Tensor,
    weights: Tensor | None,
    held_out: Tensor | None,
    held_out_weights: Tensor | None,
) -> None:
    """Refuse what cannot be trained on.

    Raises:
        RotationError: shapes that do not fit, NaN or Inf, or weights that are not positive.
    """
    require(
        samples.dim() >= 2 and samples.numel() > 0 and samples.is_floating_point(),
        f"activations of shape {tuple(samples.shape)} and dtype {samples.dtype} cannot be"
        " trained on",
        "pass floating [*batch, tokens, channels] with at least one token",
    )
    require(
        bool(torch.isfinite(samples).all()),
        "the activations hold NaN or Inf",
        "the model overflows in this dtype: load it with --dtype float32",
    )
    _check_weights(weights, samples)
    _check_weights(held_out_weights, held_out)
    if held_out is not None:
        fits = held_out.shape[:-2] == samples.shape[:-2] and held_out.shape[-1] == samples.shape[-1]
        require(
            fits and held_out.shape[-2] > 0 and bool(torch.isfinite(held_out).all()),
            f"held-out activations {tuple(held_out.shape)} do not fit {tuple(samples.shape)} or are"
            " not finite",
            "hold out tokens of the same site",
        )


def _check_weights(weights: Tensor | None, samples: Tensor | None) -> None:
    if weights is None or samples is None:
        return
    require(
        weights.shape == samples.shape[:-1]
        and bool((weights > 0).all())
        and bool(torch.isfinite(weights).all()),
        f"token weights {tuple(weights.shape)} for activations {tuple(samples.shape)} must be"
        " finite and positive",
        "pass one inverse inclusion probability for each token",
    )


def require(condition: bool, message: str, hint: str) -> None:
    """Raise :class:`~calib.errors.RotationError` unless ``condition``."""
    if not condition:
        raise RotationError(message, hint=hint)
