"""Pieces that the Tripy modules share. B = batch, T = tokens, D = model width, H = heads, K = key
and value heads, d = head width, p = tokens of a prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import nvtripy as tp
from nvtripy.frontend.module.parameter import DefaultParameter


class RMSNorm(tp.Module):  # type: ignore[misc]
    """``x / rms(x) * weight``, in float32; the result has the dtype of ``x``."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = DefaultParameter((width,), tp.float32)

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        """``[B, T, D]`` to the same shape."""
        wide = tp.cast(x, tp.float32)
        mean = tp.mean(wide * wide, dim=-1, keepdim=True)
        return tp.cast(wide * tp.rsqrt(mean + self.eps) * self.weight, x.dtype)


class LayerNorm(tp.LayerNorm):  # type: ignore[misc]
    """``tp.LayerNorm`` in float32; the result has the dtype of ``x``."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, dtype=tp.float32, eps=eps)

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        """``[B, T, D]`` to the same shape."""
        return tp.cast(super().forward(tp.cast(x, tp.float32)), x.dtype)


class Prefix(tp.Module):  # type: ignore[misc]
    """Keys and values that stand before those of every sequence; see
    :mod:`calib.network.prefix`.
    """

    def __init__(self, kv_heads: int, length: int, head_dim: int, dtype: tp.dtype) -> None:
        super().__init__()
        self.key = DefaultParameter((kv_heads, length, head_dim), dtype)
        self.value = DefaultParameter((kv_heads, length, head_dim), dtype)

    def forward(self, key: tp.Tensor, value: tp.Tensor) -> tuple[tp.Tensor, tp.Tensor]:
        """``[B, K, T, d]`` each, keys after RoPE, to ``[B, K, p + T, d]``."""
        shape = (key.shape[0], -1, -1, -1)
        keys, values = (
            tp.concatenate([tp.expand(tp.unsqueeze(before, 0), shape), x], dim=2)
            for before, x in ((self.key, key), (self.value, value))
        )
        return keys, values


def positions(tokens: tp.DimensionSize, first: int, dtype: tp.dtype) -> tp.Tensor:
    """``[T]``: those of ``tokens`` tokens, from ``first`` on."""
    counted = tp.arange(tokens, dtype=dtype)
    return counted + first if first else counted


def attention(
    query: tp.Tensor,
    key: tp.Tensor,
    value: tp.Tensor,
    scale: float,
    window: int | None,
    before: int = 0,
) -> tp.Tensor:
    """Causal attention; scores and their softmax in float32.

    Args:
        query: ``[B, ..., T, d]``.
        key: ``[B, ..., p + T, d]``, where ``...`` broadcasts against that of ``query``.
        value: the shape of ``key``.
        scale: factor of the scores.
        window: how many tokens back a token sees, itself included; ``None``: all.
        before: p, the first keys, which all tokens see, whatever the window.

    Returns:
        The shape and dtype of ``query``.
    """
    scores = tp.cast(query @ tp.transpose(key, -2, -1), tp.float32) * scale
    tokens = query.shape[query.rank - 2]
    asking = tp.reshape(positions(tokens, before, tp.int32), (tokens, 1))
    total = key.shape[key.rank - 2] if before else tokens
    asked = tp.reshape(tp.arange(total, dtype=tp.int32), (1, total))
    back = asking - asked
    if before:  # as near as a token is to itself
        back = tp.where(asked < before, 0, back)
    hidden = back < 0
    if window is not None:
        hidden = hidden | (back >= window)
    weights = tp.softmax(tp.where(hidden, -math.inf, scores), dim=-1)

    return tp.cast(weights, query.dtype) @ value


def _gelu_tanh(x: tp.Tensor) -> tp.Tensor:
    """GELU by its tanh formula, as GPT-2 has it."""
    return 0.5 * x * (1.0 + tp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": tp.silu,
    "gelu": tp.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": tp.relu,
}
"""Those of :data:`backends.safetensors.tripy.models.ACTIVATIONS`."""
