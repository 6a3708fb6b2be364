"""The grid of a weight: which float values its stored numbers stand for.

    value = (code - z) s            symmetric: z = 0 s = s1 s2                       NVFP4: E4M3
    block scales s1 relative to one float32 scale s2 of the tensor

    symmetric:   s = max(|low|, |high|) / maxbound
    asymmetric:  s = (high - low) / (qmax - qmin),   z = round(qmin - low / s),   low <= 0 <= high
    NVFP4:       s2 = amax / (6 · 448),   s1 = e4m3(block_amax / 6 / s2)
    MX:          s = 2^k,   k by :func:`calib.arithmetic.rounding.e8m0_exponent`

Weights are ``[out, in]``. Zero is on every grid, so a dead channel stays dead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.arithmetic.rounding import (
    decode,
    e8m0_exponent,
    encode,
    round_e4m3_scale,
    round_to_format,
)
from calib.arithmetic.scales import scale_of
from calib.errors import QuantizationError
from calib.schemes import (
    FLOAT8,
    Granularity,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerTensor,
    TensorScheme,
)


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a tensor.

    Attributes:
        scale: shape ``[]`` (per tensor), ``[out]`` (per channel) or ``[out, ceil(in / size)]`` (per
            block); finite and positive. Float32 holding E4M3 or power-of-two values where the
            scheme stores scales in these formats.
        zero_point: integers in the dtype and shape of ``scale``; ``None`` when symmetric.
        second_level: float32 ``[]``, the factor of every scale (NVFP4), else ``None``.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    second_level: Tensor | None = None


def weight_limits(weight: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Least and greatest element of every group of a weight ``[out, in]`` that shares a scale.

    Returns:
        Two tensors of shape ``[]`` (per tensor), ``[out]`` (per channel, axis 0) or ``[out, ceil(in
        / size)]`` (per block; the last block of a row may be short), in the dtype of the weight.
    """
    weight = weight.detach()
    match granularity:
        case PerTensor():
            low, high = torch.aminmax(weight)
        case PerChannel(axis):
            low, high = torch.aminmax(weight, dim=1 - axis)
        case PerBlock(size):
            low, high = _block_limits(weight, size)
        case _:
            raise QuantizationError(
                f"a weight has no scale {granularity}", hint="use per tensor, channel or block"
            )
    return low, high


def weight_grid(weight: Tensor, scheme: TensorScheme, dtype: torch.dtype = torch.float32) -> Grid:
    """The grid that just covers a weight ``[out, in]``: that of rounding to nearest."""
    return grid_of(*weight_limits(weight, scheme.granularity), scheme, dtype)


def grid_of(
    low: Tensor, high: Tensor, scheme: TensorScheme, dtype: torch.dtype = torch.float32
) -> Grid:
    """The grid between ``low`` and ``high``.

    Args:
        low: least value of each group, any shape.
        high: greatest value of each group, the same shape.
        scheme: format, symmetry and scale format.
        dtype: dtype of the scales where the scheme does not say; what the target computes in.

    Raises:
        QuantizationError: limits that are not finite, or a scale that overflows ``dtype``.
    """
    if scheme.symmetric:
        return symmetric_grid(torch.maximum(low.abs(), high.abs()), scheme, dtype)
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    levels = scheme.format.qmax - scheme.format.qmin
    scale = scale_of(high - low, levels, dtype)
    zero = torch.round(scheme.format.qmin - low / scale.double()).clamp(
        scheme.format.qmin, scheme.format.qmax
    )
    return Grid(scale, zero.to(dtype))


def symmetric_grid(amax: Tensor, scheme: TensorScheme, dtype: torch.dtype = torch.float32) -> Grid:
    """The grid of a symmetric scheme from the largest magnitude of each group, any shape; see
    :func:`grid_of`.
    """
    match scheme.scale_format:
        case "e4m3":
            return two_level_grid(amax, amax.max(), scheme.format)
        case "e8m0" | "e8m0-floor":
            _check_finite(amax)
            exponent = e8m0_exponent(amax, scheme.format, floor=scheme.scale_format == "e8m0-floor")
            return Grid(torch.exp2(exponent.float()))
        case _:
            return Grid(scale_of(amax, scheme.format.maxbound, dtype))


def two_level_grid(block_amax: Tensor, amax: Tensor, fmt: NumberFormat) -> Grid:
    """NVFP4's grid: E4M3 block scales under one float32 scale for the tensor.

    Args:
        block_amax: largest magnitude of each block, any shape.
        amax: largest magnitude of the tensor ``[]``.
        fmt: the format of the elements.
    """
    return grid_under(block_amax, second_level_scale(amax, fmt), fmt)


def second_level_scale(amax: Tensor, fmt: NumberFormat) -> Tensor:
    """The float32 scale of NVFP4's block scales, for a tensor whose largest magnitude is ``amax``
    ``[]``.
    """
    return scale_of(amax, fmt.maxbound * FLOAT8.maxbound)


def grid_under(block_amax: Tensor, second: Tensor, fmt: NumberFormat) -> Grid:
    """:func:`two_level_grid` under a second-level scale ``[]`` that is known, as that of calibrated
    activations is.
    """
    _check_finite(block_amax)
    # One division, as ModelOpt has it: where amax / 6 / s2 is rounded twice, a scale halfway may
    # end up elsewhere.
    return Grid(round_e4m3_scale(block_amax.float() / (fmt.maxbound * second)), second_level=second)


def expand_grid(
    grid: Grid, shape: torch.Size, granularity: Granularity
) -> tuple[Tensor, Tensor | None]:
    """Effective scale and zero point, float32, in shapes that broadcast against a weight of
    ``shape`` ``[out, in]``.
    """
    scale = grid.scale.float()
    if grid.second_level is not None:
        scale = scale * grid.second_level
    zero = None if grid.zero_point is None else expand(grid.zero_point.float(), shape, granularity)
    return expand(scale, shape, granularity), zero


def expand(values: Tensor, shape: torch.Size, granularity: Granularity) -> Tensor:
    """One value for each group, in a shape that broadcasts against a tensor of ``shape`` ``[...,
    in]``.
    """
    match granularity:
        case PerChannel(axis):
            return values.unsqueeze(1 - axis)
        case PerBlock(size):
            return values.repeat_interleave(size, dim=-1)[..., : shape[-1]]
        case _:
            return values


def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: NumberFormat) -> Tensor:
    """Quantize and dequantize: ``(clamp(round(x / s) + z) - z) s``, ties to even.

    For integers this is ONNX's QuantizeLinear and DequantizeLinear to the bit. ModelOpt multiplies
    by ``127 / amax`` instead, which rounds differently in about one of 10^5 values.

    Args:
        x: float values, any shape.
        scale: effective scale, broadcastable against ``x``.
        zero_point: the same, or ``None``.
        fmt: format of the stored values.
    """
    if zero_point is None:
        return round_to_format(x / scale, fmt) * scale
    codes = ((x / scale).round() + zero_point).clamp(fmt.qmin, fmt.qmax)
    return (codes - zero_point) * scale


def quantize(weight: Tensor, grid: Grid, scheme: TensorScheme) -> Tensor:
    """Round a float weight ``[out, in]`` to the stored values of its format.

    Returns:
        Same shape: int8 storage for integer formats (int4 unpacked), ``float8_e4m3fn``, or E2M1
        codes in uint8.
    """
    scale, zero = expand_grid(grid, weight.shape, scheme.granularity)
    ratio = weight.float() / scale
    if zero is not None:
        ratio = ratio.round() + zero
    return encode(round_to_format(ratio, scheme.format), scheme.format)


def dequantize(stored: Tensor, grid: Grid, scheme: TensorScheme) -> Tensor:
    """The float32 values ``[out, in]`` that stored values stand for."""
    scale, zero = expand_grid(grid, stored.shape, scheme.granularity)
    values = decode(stored, scheme.format)
    return (values if zero is None else values - zero) * scale


def _block_limits(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The short last block is filled up with its own last column, which moves no limit."""
    short = -weight.shape[-1] % size
    if short:
        weight = torch.cat([weight, weight[..., -1:].expand(*weight.shape[:-1], short)], dim=-1)
    low, high = torch.aminmax(weight.reshape(*weight.shape[:-1], -1, size), dim=-1)
    return low, high


def _check_finite(amax: Tensor) -> None:
    if not bool(torch.isfinite(amax).all()):
        raise QuantizationError(
            "amax must be finite to become a scale; the statistics hold NaN or Inf"
        )
