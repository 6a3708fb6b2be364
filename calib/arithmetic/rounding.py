"""Rounding to the values of a number format, and to the formats that scales are stored in.

E2M1 (OCP MX specification 1.0, section 5.3.3): one sign, two exponent and one mantissa bit, no
infinities,

    code & 7:   0    1    2    3    4    5    6    7
    magnitude:  0   0.5   1   1.5   2    3    4    6

Ties go to the even code: 0.25 to 0, 0.75 to 1, 1.25 to 1, 1.75 to 2, 2.5 to 2, 3.5 to 4, 5 to 4.
Larger magnitudes saturate at 6.

E4M3 is ``torch.float8_e4m3fn``: ties to even, saturated at 448 here. E8M0 is a power of two, 2^-127
to 2^127.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib.schemes import FLOAT8, NumberFormat

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3_TINY = 2.0**-9
"""The smallest positive E4M3 number; a scale below it would be stored as zero."""
_SIGN = 8


def round_to_format(ratio: Tensor, fmt: NumberFormat) -> Tensor:
    """The representable values nearest to ``ratio``, saturated, in its dtype (float32 or wider);
    ties to even.
    """
    clamped = ratio.clamp(fmt.qmin, fmt.qmax)
    if fmt.kind == "integer":
        return clamped.round()
    if fmt.bits == 8:
        return clamped.to(torch.float8_e4m3fn).to(ratio.dtype)
    return _round_e2m1(clamped)


def neighbours(values: Tensor, fmt: NumberFormat) -> tuple[Tensor, Tensor]:
    """The representable numbers next below and next above representable ``values``; at the ends,
    the values again.
    """
    table = _representable(fmt).to(values)
    index = torch.searchsorted(table, values.contiguous())
    return table[(index - 1).clamp(min=0)], table[(index + 1).clamp(max=table.numel() - 1)]


def _representable(fmt: NumberFormat) -> Tensor:
    """Every number of the format within its limits, float32, ascending."""
    if fmt.kind == "integer":
        return torch.arange(fmt.qmin, fmt.qmax + 1)
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    values = decode(codes.view(torch.float8_e4m3fn) if fmt.bits == 8 else codes, fmt)
    return torch.tensor(sorted(set(values[values.isfinite()].tolist())))


def encode(values: Tensor, fmt: NumberFormat) -> Tensor:
    """Representable ``values`` as they are stored: int8 for integers, float8_e4m3fn, or E2M1 codes
    in uint8.
    """
    if fmt.kind == "integer":
        return values.to(torch.int8)
    if fmt.bits == 8:
        return values.to(torch.float8_e4m3fn)
    code = torch.searchsorted(_magnitudes(values), values.abs().contiguous())
    return (code + _SIGN * torch.signbit(values)).to(torch.uint8)


def decode(stored: Tensor, fmt: NumberFormat) -> Tensor:
    """The float32 values that :func:`encode` stored."""
    if fmt.name != "float4_e2m1":
        return stored.float()
    table = torch.cat([_magnitudes(stored).float(), -_magnitudes(stored).float()])
    return table[stored.int()]


def round_e4m3_scale(scale: Tensor) -> Tensor:
    """Positive scales rounded to positive E4M3 numbers, held in float32."""
    return scale.float().clamp(_E4M3_TINY, FLOAT8.maxbound).to(torch.float8_e4m3fn).float()


def e8m0_exponent(amax: Tensor, fmt: NumberFormat, *, floor: bool) -> Tensor:
    """Exponent ``k`` of the power-of-two scale of a block, int32 in -127 … 127.

        ceil rule (ModelOpt):  k = ceil(log2(amax / maxbound)),    the least scale that clips
        nothing floor rule (OCP MX):   k = floor(log2(amax)) - floor(log2(maxbound))

    By ``frexp``, ``amax = m 2^e`` with ``m`` in [1/2, 1), so that powers of two are exact.
    """
    if floor:
        _, exponent = torch.frexp(amax.double())
        power = exponent - math.frexp(fmt.maxbound)[1]
    else:
        mantissa, exponent = torch.frexp(amax.double() / fmt.maxbound)
        power = exponent - (mantissa == 0.5).int()
    return torch.where(amax > 0, power, -127).clamp(-127, 127).int()


def _round_e2m1(x: Tensor) -> Tensor:
    """By the step of each binade: 1/2 up to 2, 1 up to 4, 2 up to 6; dividing by a power of two is
    exact.
    """
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step).copysign(x)


def _magnitudes(like: Tensor) -> Tensor:
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.tensor(E2M1_MAGNITUDES, device=like.device, dtype=dtype)
