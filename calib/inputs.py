"""What a quantized linear does to its input: fake quantization of activations ``[..., in]``.

    static, per tensor:    one calibrated scale (and zero point) for everything
    static, per cluster:   one calibrated scale for each set of channels, expanded to ``[in]``
    dynamic, per token:    limits of each row, while running
    dynamic, per block:    limits of each block of a row, while running; NVFP4 under a calibrated second-level scale

The arithmetic is that of weights: :func:`calib.grids.grid_of` and :func:`calib.grids.round_to_grid`, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.errors import QuantizationError
from calib.grids import Grid, expand_grid, grid_of, grid_under, round_to_grid, two_level_grid, weight_limits
from calib.schemes import Granularity, PerBlock, PerCluster, PerTensor, PerToken, TensorScheme


def fake_quantize_input(
    x: Tensor, scheme: TensorScheme, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """Quantize and dequantize activations as ``scheme`` does.

    Args:
        x: float32 ``[..., in]``.
        scheme: how.
        scale: static schemes: the scale, ``[]`` or (per cluster) ``[in]``. NVFP4: the second-level scale ``[]``.
        zero_point: static asymmetric schemes: like ``scale``.

    Returns:
        A tensor like ``x``.

    Raises:
        QuantizationError: a calibrated scale is needed and missing, or the granularity is not one of activations.
    """
    if scheme.needs_calibration and scale is None:
        raise QuantizationError("this input needs a calibrated scale and has none", hint="calibrate the model first")
    if not scheme.dynamic:
        assert scale is not None
        if not isinstance(scheme.granularity, PerTensor | PerCluster):
            raise _no_such(scheme.granularity)
        return round_to_grid(x, scale, zero_point, scheme.format)
    rows = x.reshape(-1, x.shape[-1])
    match scheme.granularity:
        case PerToken():
            low, high = torch.aminmax(rows, dim=-1, keepdim=True)
            grid = grid_of(low, high, scheme)
            return round_to_grid(rows, grid.scale, grid.zero_point, scheme.format).reshape(x.shape)
        case PerBlock():
            steps, zero = expand_grid(_block_grid(rows, scheme, scale), rows.shape, scheme.granularity)
            return round_to_grid(rows, steps, zero, scheme.format).reshape(x.shape)
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
        amax = torch.maximum(low.abs(), high.abs())
        second = two_level_grid(amax, amax, scheme.format).second_level
        assert second is not None
        return Grid(second)
    return grid_of(low, high, scheme, dtype)


def _block_grid(rows: Tensor, scheme: TensorScheme, second: Tensor | None) -> Grid:
    low, high = weight_limits(rows, scheme.granularity)
    if second is None:
        return grid_of(low, high, scheme)
    return grid_under(torch.maximum(low.abs(), high.abs()), second, scheme.format)


def _no_such(granularity: Granularity) -> QuantizationError:
    return QuantizationError(
        f"activations cannot be quantized by {granularity}", hint="use per tensor, token, block or cluster"
    )
