"""What a quantized linear does to its input: fake quantization of activations ``[..., in]``.

    static, per tensor:    one calibrated scale (and zero point) for everything static, per cluster:
    one calibrated scale for each set of channels, expanded to ``[in]`` dynamic, per token:
    limits of each row, while running dynamic, per block:    limits of each block of a row, while
    running; NVFP4 under a calibrated second-level scale

The arithmetic is that of weights: :func:`calib.arithmetic.grids.grid_of` and
:func:`calib.arithmetic.grids.round_to_grid`, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.arithmetic.grids import (
    Grid,
    expand_grid,
    grid_of,
    grid_under,
    round_to_grid,
    second_level_scale,
    symmetric_grid,
    weight_limits,
)
from calib.errors import QuantizationError
from calib.schemes import Granularity, PerBlock, PerCluster, PerTensor, PerToken, TensorScheme


def fake_quantize_input(
    x: Tensor, scheme: TensorScheme, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """Quantize and dequantize activations as ``scheme`` does.

    Args:
        x: float32 ``[..., in]``.
        scheme: how.
        scale: static schemes: the scale, ``[]`` or (per cluster) ``[in]``. NVFP4: the second-level
            scale ``[]``.
        zero_point: static asymmetric schemes: like ``scale``.

    Returns:
        A tensor like ``x``.

    Raises:
        QuantizationError: a calibrated scale is needed and missing, or the granularity is not one
            of activations.
    """
    return round_to_grid(x, *input_steps(x, scheme, scale, zero_point), scheme.format)


def input_steps(
    x: Tensor, scheme: TensorScheme, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every value of ``x``, broadcastable to its shape.

    Arguments and errors as for :func:`fake_quantize_input`.
    """
    if scheme.needs_calibration and scale is None:
        raise QuantizationError(
            "this input needs a calibrated scale and has none", hint="calibrate the model first"
        )
    if not scheme.dynamic:
        assert scale is not None
        if not isinstance(scheme.granularity, PerTensor | PerCluster):
            raise _no_such(scheme.granularity)
        return scale, zero_point

    match scheme.granularity:
        case PerToken():
            grid = grid_of(*torch.aminmax(x, dim=-1, keepdim=True), scheme)
            return _rowwise(grid.scale, x), None if grid.zero_point is None else _rowwise(
                grid.zero_point, x
            )
        case PerBlock():
            rows = x.reshape(-1, x.shape[-1])
            steps, zero = expand_grid(
                _block_grid(rows, scheme, scale), rows.shape, scheme.granularity
            )
            return steps.reshape(x.shape), None if zero is None else zero.reshape(x.shape)
        case _:
            raise _no_such(scheme.granularity)


def input_grid(low: Tensor, high: Tensor, scheme: TensorScheme, dtype: torch.dtype) -> Grid:
    """The calibrated part of an input's grid from its observed limits.

    Args:
        low: least value ``[]``, or of each channel's cluster ``[in]``.
        high: greatest value, the same shape.
        scheme: a scheme that needs calibration.
        dtype: dtype of the scale; what the target computes in.

    Returns:
        Scale and zero point; for NVFP4 the second-level scale stands in ``scale``.
    """
    if scheme.scale_format == "e4m3":
        return symmetric_input_grid(torch.maximum(low.abs(), high.abs()), scheme, dtype)
    return grid_of(low, high, scheme, dtype)


def symmetric_input_grid(amax: Tensor, scheme: TensorScheme, dtype: torch.dtype) -> Grid:
    """:func:`input_grid` of a symmetric scheme, of which the largest magnitude ``[]`` is all that
    has to be known.
    """
    if scheme.scale_format == "e4m3":
        return Grid(second_level_scale(amax, scheme.format))
    return symmetric_grid(amax, scheme, dtype)


def _rowwise(values: Tensor, x: Tensor) -> Tensor:
    """One value for each row of ``x`` ``[..., in]``, as ``[..., 1]``."""
    return values.reshape(*x.shape[:-1], 1)


def _block_grid(rows: Tensor, scheme: TensorScheme, second: Tensor | None) -> Grid:
    low, high = weight_limits(rows, scheme.granularity)
    if second is None:
        return grid_of(low, high, scheme)
    return grid_under(torch.maximum(low.abs(), high.abs()), second, scheme.format)


def _no_such(granularity: Granularity) -> QuantizationError:
    return QuantizationError(
        f"activations cannot be quantized by {granularity}",
        hint="use per tensor, token, block or cluster",
    )
