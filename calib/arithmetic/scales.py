"""From observed magnitudes to scales; what is rounded with them is in
:mod:`calib.arithmetic.grids`.

Two conventions are in use in the field, and both are here under their own names:

* :func:`convert_to_scale`: ``scale = amax / maxbound``, ModelOpt's and every runtime's symmetric
  convention. rotq uses this one everywhere.
* :func:`compute_scale`: ``scale = 2 amax / (quant_max - quant_min)``, the QAT convention of
  Horizon's plugin. For int8 over -128 … 127 it divides by 127.5, so the two differ by 0.4 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.errors import QuantizationError


def convert_to_scale(
    amax: Tensor, maxbound: float, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Turn the largest magnitude of a range into the step between two quantized values.

        scale = amax / maxbound,   so that   scale * maxbound = amax

    The division is done in float64 and rounded once. A dead channel (amax 0) and a range that
    underflows ``dtype`` both get the smallest normal number of ``dtype``: runtimes reject a scale
    of zero, and every value of such a range quantizes to zero either way.

    Args:
        amax: largest magnitudes, any shape, any float dtype, in the units of the data; all finite
            and >= 0.
        maxbound: the largest magnitude that the quantized format represents (int8 127, int4 7,
            float8 E4M3 448).
        dtype: dtype of the scales; the dtype the target computes in.

    Returns:
        Scales of shape ``amax.squeeze().shape`` and dtype ``dtype``, every one finite and > 0.

    Raises:
        QuantizationError: an amax is negative, NaN or infinite, or overflows ``dtype``; or
            ``maxbound`` is not above 0.

    Source: ``convert_to_scale`` of the nanoGPT example in NVIDIA's TensorRT-Incubator.
    """
    return scale_of(amax, maxbound, dtype).squeeze()


def scale_of(amax: Tensor, maxbound: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`convert_to_scale` in the shape of ``amax``."""
    if not maxbound > 0:
        raise QuantizationError(f"maxbound must be positive, got {maxbound}")
    if not bool(torch.isfinite(amax).all()) or bool((amax < 0).any()):
        raise QuantizationError(
            "amax must be finite and >= 0 to become a scale; the statistics hold NaN, Inf or a"
            " negative value"
        )
    scale = (amax.detach().double() / maxbound).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    if not bool(torch.isfinite(scale).all()):
        raise QuantizationError(
            f"a scale overflows {dtype}: the largest amax is {float(amax.max()):.4g}"
        )
    return scale


def compute_scale(data: Tensor, quant_min: float, quant_max: float) -> Tensor:
    """Scale of ``data`` over an integer range, in the QAT convention.

        scale = 2 max|data| / (quant_max - quant_min)

    Args:
        data: any non-empty float tensor; the scale has its units.
        quant_min: smallest integer of the range (int8: -128).
        quant_max: largest integer of the range (int8: 127); above ``quant_min``.

    Returns:
        A scale of shape ``[]`` in the dtype of ``data``, finite and > 0 (all-zero ``data``:
        smallest normal number).

    Raises:
        QuantizationError: ``data`` is empty or holds NaN or Inf, or the range is empty.

    Source: ``compute_scale`` of Horizon's plugin documentation ("Calibration").
    """
    if quant_max <= quant_min:
        raise QuantizationError(f"quant_max ({quant_max}) must be above quant_min ({quant_min})")
    if data.numel() == 0:
        raise QuantizationError("cannot compute a scale of an empty tensor")
    return convert_to_scale(
        data.detach().abs().max(), (quant_max - quant_min) / 2, dtype=data.dtype
    )
