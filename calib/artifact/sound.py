"""Whether the numbers of a linear are such as rotq writes: what a checksum does not say of a file
that was made elsewhere, or edited and sealed anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.artifact.model import QuantizedLinear
from calib.errors import CheckpointError
from calib.schemes import NumberFormat

_STORED = {
    "int8": torch.int8,
    "int4": torch.int8,
    "float8_e4m3": torch.float8_e4m3fn,
    "float4_e2m1": torch.uint8,
}
"""Dtype of weights by format."""


def check_linear(linear: QuantizedLinear) -> None:
    """Refuse a linear whose numbers cannot be right.

    Raises:
        CheckpointError: a scale that is not positive and finite, a weight that is not stored as its
            format is or beyond its range, a shape that does not fit the weight's.
    """
    fmt = linear.weight_scheme.format
    if linear.weight.dtype != _STORED[fmt.name] or linear.weight.dim() != 2:
        _refuse(linear, f"its weight is {linear.weight.dtype} {list(linear.weight.shape)}")
    if fmt.kind == "integer" and fmt.bits < 8 and not _within(linear.weight, fmt):
        _refuse(linear, f"its weight holds numbers beyond {fmt.qmin:g} to {fmt.qmax:g}")

    for part in ("weight_scale", "weight_second_scale", "input_scale"):
        scale = getattr(linear, part)
        if scale is not None and not bool((torch.isfinite(scale.float()) & (scale > 0)).all()):
            _refuse(linear, f"its {part} is not positive and finite")

    rows, columns = linear.weight.shape
    if linear.bias is not None and linear.bias.shape != (rows,):
        _refuse(linear, f"its bias is {list(linear.bias.shape)}, of {rows} outputs")
    if linear.bias is not None and not bool(torch.isfinite(linear.bias).all()):
        _refuse(linear, "its bias is not finite")
    order = linear.weight_order
    if order is not None and not torch.equal(order.sort().values, torch.arange(columns)):
        _refuse(linear, f"its weight_order is no order of {columns} inputs")


def _within(weight: Tensor, fmt: NumberFormat) -> bool:
    low, high = weight.aminmax()
    return fmt.qmin <= float(low) and float(high) <= fmt.qmax


def _refuse(linear: QuantizedLinear, why: str) -> None:
    raise CheckpointError(
        f"the saved linear '{linear.name}' cannot be right: {why}",
        hint="run `rotq calibrate` again",
    )
