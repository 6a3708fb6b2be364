"""A quantized weight in the graph: stored ``[in, out]``, dequantized right in front of its MatMul.

    int8, int4, float8:   DequantizeLinear(codes, s, z)          per tensor; per channel: axis 1; in
    blocks: axis 0 NVFP4:                s = DequantizeLinear(s1 in E4M3, s2) in float32;
    DequantizeLinear(codes, s) -> Cast MXFP8:                trt::TRT_MXFP8DequantizeLinear(codes,
    exponents + 127)

The weight is stored transposed from the artifact's ``[out, in]`` so that its DequantizeLinear feeds
MatMul directly: the form that runtimes turn into a kernel.

An int8 weight that is multiplied by integers may be stored in uint8, ``w + 128`` around ``z +
128``. Processors with AVX2 or AVX-512 and without VNNI multiply unsigned by signed bytes with one
instruction (VPMADDUBSW) that adds two products in 16 bits:

    |x_k w_k + x_(k+1) w_(k+1)| <= 32767,    0 <= x <= 255,  -128 <= w <= 127,    or it is clipped

which inputs around 128 reach where two weights are large: of normal ones relative L2 1.6 % of the
product is lost. For two unsigned bytes the same processors widen both to 16 bits first, and add in
32: exact, and in 1.3 times the time. With VNNI signed weights are exact, and faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from backends.onnx.inputs import mxfp8_values, zero_points
from backends.onnx.linear_nodes import STORAGE, LinearNodes
from backends.onnx.names import Label, Part, initializer_name
from calib.artifact import QuantizedLinear
from calib.schemes import Granularity, PerBlock, PerChannel

E8M0_BIAS = 127


def dequantized_weight(
    nodes: LinearNodes,
    linear: QuantizedLinear,
    weights: Sequence[Tensor],
    rows: int,
    *,
    unsigned: bool = False,
) -> ir.Value:
    """The weight ``[rows, out]`` in the dtype of the graph.

    Args:
        nodes: of the linear.
        linear: its scale format is ``e8m0`` only with float8.
        weights: what its rows are read from, in turn.
        rows: input features, and further ones that are zero; see :func:`padded_width`.
        unsigned: it is of int8, and stored in uint8.
    """
    scheme = linear.weight_scheme
    stored = ir.DataType.UINT8 if unsigned else STORAGE[scheme.format.name]
    codes = nodes.weight(weights, stored, rows)

    match scheme.scale_format:
        case "e4m3":
            return _nvfp4(nodes, linear, codes)
        case "e8m0" | "e8m0-floor":
            return _mxfp8(nodes, linear, codes)

    scale, points = (
        None if each is None else turned(each, scheme.granularity)
        for each in (linear.weight_scale, linear.weight_zero_point)
    )
    assert scale is not None  # every quantized weight has one
    inputs = [codes, nodes.scale(Part.WEIGHT_SCALE, scale)]
    if points is not None or unsigned:
        part = Part.WEIGHT_ZERO_POINT
        inputs.append(zero_points(nodes, part, points, scale, scheme.format, unsigned=unsigned))

    return nodes.op(
        "DequantizeLinear", inputs, Label.DEQUANTIZE_WEIGHT, **_attributes(scheme.granularity)
    )


def padded_width(linear: QuantizedLinear, *, whole_blocks: bool) -> int:
    """Rows of the stored weight: its input features, filled up to whole blocks where these are
    asked for.
    """
    width = linear.weight.shape[1]
    granularity = linear.weight_scheme.granularity
    return (
        width + -width % granularity.size
        if whole_blocks and isinstance(granularity, PerBlock)
        else width
    )


def turned(scales: Tensor, granularity: Granularity) -> Tensor:
    """Scales of ``[out, in]`` for ``[in, out]`` and back: ``[]``, ``[out]`` or, in blocks,
    ``[blocks, out]``.
    """
    return scales.T if isinstance(granularity, PerBlock) else scales


def _attributes(granularity: Granularity) -> dict[str, int]:
    match granularity:
        case PerChannel():
            return {"axis": 1}
        case PerBlock(size):
            return {"axis": 0, "block_size": size}
        case _:
            return {}


def _nvfp4(nodes: LinearNodes, linear: QuantizedLinear, codes: ir.Value) -> ir.Value:
    second = linear.weight_second_scale
    assert second is not None
    granularity = linear.weight_scheme.granularity
    first = nodes.scale(
        Part.WEIGHT_SCALE, turned(linear.weight_scale, granularity), torch.float8_e4m3fn
    )
    whole = nodes.scale(Part.WEIGHT_SECOND_SCALE, second, torch.float32)
    step = nodes.op("DequantizeLinear", [first, whole], Label.DEQUANTIZE_WEIGHT_SCALE)
    values = nodes.op(
        "DequantizeLinear", [codes, step], Label.DEQUANTIZE_WEIGHT, **_attributes(granularity)
    )
    return nodes.op("Cast", [values], Label.CAST_WEIGHT, to=int(nodes.dtype))


def _mxfp8(nodes: LinearNodes, linear: QuantizedLinear, codes: ir.Value) -> ir.Value:
    granularity = linear.weight_scheme.granularity
    assert isinstance(granularity, PerBlock)
    scales = turned(linear.weight_scale, granularity)

    def exponents() -> Tensor:
        """frexp gives m 2^e with m = 1/2, so that the power of two has exponent e - 1."""
        return (torch.frexp(scales)[1] - 1 + E8M0_BIAS).to(torch.uint8).contiguous()

    stored = nodes.lazy(
        initializer_name(nodes.name, Part.WEIGHT_SCALE), scales.shape, ir.DataType.UINT8, exponents
    )
    return mxfp8_values(
        nodes, codes, stored, Label.DEQUANTIZE_WEIGHT, axis=0, size=granularity.size
    )
