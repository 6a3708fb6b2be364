"""Integers and FP4 numbers out of the words that they are packed into."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.arithmetic.rounding import decode
from calib.schemes import FLOAT4

_WORD = 32


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Unsigned integers of ``bits`` bits, which follow each other from the lowest bit of the first
    word on: number ``i`` begins at bit ``i * bits``, and may go on in the next word.

    Args:
        words: int32 ``[..., n]``.
        bits: 1 to 8.
        count: how many numbers there are in a row.

    Returns:
        int32 ``[..., count]``.
    """
    wide = words.long() & (2**_WORD - 1)
    starts = torch.arange(count, device=words.device) * bits
    index, shift = starts // _WORD, starts % _WORD
    following = (index + 1).clamp(max=words.shape[-1] - 1)
    both = (wide[..., index] >> shift) | (wide[..., following] << (_WORD - shift))
    numbers: Tensor = both & (2**bits - 1)
    return numbers.int()


def fp4_values(codes: Tensor) -> Tensor:
    """E2M1 numbers, two in a byte, the first in its low half: uint8 ``[..., n]`` to float32 ``[...,
    2 n]``.
    """
    return decode(torch.stack([codes & 15, codes >> 4], dim=-1), FLOAT4).flatten(-2)
