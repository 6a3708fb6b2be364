"""TensorRT's number formats, written out from their definitions, in numpy and float64.

Nothing here comes from ``calib`` or ``backends``: an error that both sides share would cancel.

    E4M3: 1 sign, 4 exponent (bias 7) and 3 mantissa bits; the last code is NaN, 448 the largest
    E2M1: 1 sign, 2 exponent (bias 1) and 1 mantissa bit; 6 is the largest
    E8M0: a power of two, 2^-127 to 2^127
    INT4, INT8: two's complement

Numbers round to the nearest, ties to the even code, and saturate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def magnitudes(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """What the codes without a sign stand for, by code."""
    steps = 2**mantissa_bits
    values = []
    for code in range(2**exponent_bits * steps):
        exponent, mantissa = divmod(code, steps)
        # exponent 0 holds the subnormal numbers, which have no leading one
        fraction = mantissa / steps + (exponent > 0)
        values.append(math.ldexp(fraction, max(exponent, 1) - bias))
    return np.array(values)


E4M3 = magnitudes(4, 3, 7)[:-1]
E2M1 = magnitudes(2, 1, 1)
_FLOATS = {"FP8": E4M3, "FP4": E2M1}
_INTEGERS = {"INT8": (-128, 127), "INT4": (-8, 7)}


def rounded(x: Tensor, dtype: str) -> Tensor:
    """The numbers of TensorRT's ``dtype`` that ``x`` rounds to, float32."""
    values = x.double().numpy()
    if dtype in _INTEGERS:
        return torch.from_numpy(np.rint(values).clip(*_INTEGERS[dtype])).float()

    table = _FLOATS[dtype]
    magnitude = np.abs(values).clip(max=table[-1])
    above = np.searchsorted(table, magnitude)
    below = np.maximum(above - 1, 0)
    to_above, to_below = table[above] - magnitude, magnitude - table[below]
    nearest_is_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    code = np.where(nearest_is_above, above, below)
    return torch.from_numpy(np.copysign(table[code], values)).float()


def unpacked(stored: Tensor, shape: Sequence[int], dtype: str) -> Tensor:
    """The numbers that a four-bit constant holds, two in a byte, the first in the low nibble."""
    data = stored.numpy()
    codes = np.stack([data % 16, data // 16], axis=-1).reshape(-1)
    codes = codes[: math.prod(shape)].reshape(tuple(shape)).astype(np.int64)
    if dtype == "INT4":
        return torch.from_numpy(np.where(codes > 7, codes - 16, codes)).float()
    sign = np.where(codes > 7, -1.0, 1.0)
    return torch.from_numpy(sign * E2M1[codes % 8]).float()


def quantized_blocks(
    x: Tensor, dtype: str, size: int, second: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What ``DynamicQuantize`` makes of ``x`` ``[T, in]``.

    Args:
        x: the input.
        dtype: of the values.
        size: input features that share a scale.
        second: factor of the scales, which are E4M3 numbers (NVFP4); ``None``: powers of two (MX).

    Returns:
        Values ``[T, in]`` of ``dtype``, and scales ``[T, in / size]`` without their factor.
    """
    blocks = x.double().reshape(x.shape[0], -1, size)
    exact = blocks.abs().amax(-1) / _FLOATS[dtype][-1]
    if second is None:
        # the least power of two under which nothing saturates
        scale = torch.exp2(exact.log2().ceil().clamp(-127, 127))
        steps = scale
    else:
        scale = rounded(exact / second.double(), "FP8")
        steps = scale.double() * second.double()
    ratio = torch.where(steps[..., None] > 0, blocks / steps[..., None], 0.0)
    return rounded(ratio, dtype).reshape(x.shape), scale.float()
