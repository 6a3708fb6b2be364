"""Four-bit values as TensorRT reads them: flat, in row-major order, two in a byte, the first in the
low nibble.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """Codes of any shape (int8 in -8 … 7, or E2M1 codes in uint8) to uint8 ``[ceil(n / 2)]``."""
    nibbles = codes.contiguous().reshape(-1).view(torch.uint8) & 0xF
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack(packed: Tensor, shape: Sequence[int], *, signed: bool) -> Tensor:
    """The inverse of :func:`pack`: codes of ``shape``, int8 if ``signed`` and else uint8.

    Raises:
        ValueError: ``packed`` holds another number of codes.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (packed_size(count),):
        raise ValueError(
            f"{list(shape)} four-bit values are no {packed.dtype} {list(packed.shape)}"
        )

    nibbles = (
        torch.stack([packed & 0xF, packed >> 4], dim=1).reshape(-1)[:count].reshape(tuple(shape))
    )
    # shifting left and back again copies the sign bit
    return (nibbles << 4).view(torch.int8) >> 4 if signed else nibbles


def packed_size(count: int) -> int:
    """Bytes that ``count`` four-bit values take."""
    return -(-count // 2)
