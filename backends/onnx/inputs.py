"""What a quantized linear does to its input in the graph.

    static:   x -> QuantizeLinear(s, z) -> DequantizeLinear(s, z) NVFP4:    x ->
    trt::TRT_FP4DynamicQuantize(s2) -> codes, s1;   s = DequantizeLinear(s1, s2) in float32
                   DequantizeLinear(codes, s) -> Cast
    MXFP8:    x -> trt::TRT_MXFP8DynamicQuantize -> codes, exponents ->
    trt::TRT_MXFP8DequantizeLinear

Static int8 is stored in uint8 where the target gains by it, saturating at the same values:

    q' = q + 128,  z' = z + 128:    s (q' - z') = s (q - z),    q in -128..127  <=>  q' in 0..255

The left operand of x86's integer products is unsigned. ONNX Runtime turns a pair of int8 into one
of uint8 only where it serves a single MatMul, while it merges pairs that are equal, as those of
linears that read one value mostly are. Merged ones of int8 make no integer kernels. Merged ones of
uint8 do, and the value is quantized once for all. Weights of uint8 are another matter:
:mod:`backends.onnx.weights`.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from backends.onnx.linear_nodes import STORAGE, UNSIGNED_ZERO, LinearNodes
from backends.onnx.names import ZERO_POINT, Label, Part, initializer_name
from calib.artifact import QuantizedLinear
from calib.errors import BackendError
from calib.schemes import INT8, NumberFormat, PerBlock, PerCluster, TensorScheme

TRT = "trt"
"""Domain of TensorRT's own operators."""


def quantized_input(
    nodes: LinearNodes, x: ir.Value, linear: QuantizedLinear, *, unsigned: bool = False
) -> ir.Value:
    """``x`` rounded as the linear's ``input_scheme`` says.

    Args:
        nodes: of the linear.
        x: ``[..., in]``, after any online rotation.
        linear: its input is quantized; blocks divide its input features.
        unsigned: store int8 with calibrated scales in uint8.

    Raises:
        BackendError: no operator computes such scales while running.
    """
    scheme = linear.input_scheme
    assert scheme is not None
    if not scheme.dynamic:
        return _static(nodes, x, linear, scheme, unsigned=unsigned and scheme.format == INT8)
    if isinstance(scheme.granularity, PerBlock) and scheme.scale_format == "e4m3":
        return _nvfp4(nodes, _of_known_width(nodes, x, linear), linear, scheme.granularity.size)

    if (
        isinstance(scheme.granularity, PerBlock)
        and scheme.scale_format == "e8m0"
        and scheme.format.bits == 8
    ):
        return _mxfp8(nodes, _of_known_width(nodes, x, linear), scheme.granularity.size)

    raise BackendError(f"no operator of ONNX quantizes the input of '{linear.name}' while running")


def pad_features(nodes: LinearNodes, x: ir.Value, missing: int) -> ir.Value:
    """``x [..., n]`` with ``missing`` zeros behind its last axis."""
    if not missing:
        return x
    assert x.shape is not None
    rank = len(x.shape)
    return _like(
        nodes.op("Pad", [x, nodes.integers([0] * (2 * rank - 1) + [missing])], Label.PAD), x
    )


def _static(
    nodes: LinearNodes,
    x: ir.Value,
    linear: QuantizedLinear,
    scheme: TensorScheme,
    *,
    unsigned: bool,
) -> ir.Value:
    assert linear.input_scale is not None
    assert x.shape is not None
    scale = nodes.scale(Part.INPUT_SCALE, linear.input_scale)
    points = linear.input_zero_point
    zero = zero_points(
        nodes, Part.INPUT_ZERO_POINT, points, linear.input_scale, scheme.format, unsigned=unsigned
    )
    axis = {"axis": len(x.shape) - 1} if isinstance(scheme.granularity, PerCluster) else {}
    stored = nodes.op("QuantizeLinear", [x, scale, zero], Label.QUANTIZE_INPUT, **axis)

    return _like(
        nodes.op("DequantizeLinear", [stored, scale, zero], Label.DEQUANTIZE_INPUT, **axis), x
    )


def _of_known_width(nodes: LinearNodes, x: ir.Value, linear: QuantizedLinear) -> ir.Value:
    """TensorRT's quantizers want to know the axis of the blocks, which the Reshape after attention
    leaves open.
    """
    assert x.shape is not None
    dims = [*[0] * (len(x.shape) - 1), linear.weight.shape[1]]
    return _like(nodes.op("Reshape", [x, nodes.integers(dims)], Label.WIDTH), x)


def zero_points(
    nodes: LinearNodes,
    part: Part,
    points: torch.Tensor | None,
    scale: torch.Tensor,
    fmt: NumberFormat,
    *,
    unsigned: bool = False,
) -> ir.Value:
    """Zero points of the shape of ``scale``, which say as what the integers are stored.

    Args:
        nodes: of the linear.
        part: what they are called.
        points: as the artifact has them; ``None``: all zero.
        scale: that they stand beside.
        fmt: of the integers.
        unsigned: store int8 in uint8.
    """
    storage = ir.DataType.UINT8 if unsigned else STORAGE[fmt.name]
    above = UNSIGNED_ZERO if unsigned else 0
    if points is None:
        return nodes.filled(ZERO_POINT, tuple(scale.shape), storage, above)

    dtype = torch.uint8 if unsigned else torch.int8
    return nodes.lazy(
        initializer_name(nodes.name, part),
        points.shape,
        storage,
        lambda: (points.short() + above).to(dtype).contiguous(),
    )


def _nvfp4(nodes: LinearNodes, x: ir.Value, linear: QuantizedLinear, size: int) -> ir.Value:
    assert linear.input_scale is not None
    second = nodes.scale(Part.INPUT_SCALE, linear.input_scale, torch.float32)
    codes, scales = nodes.custom(
        "TRT_FP4DynamicQuantize",
        [x, second],
        Label.QUANTIZE_INPUT,
        domain=TRT,
        outputs=2,
        axis=-1,
        block_size=size,
        scale_type=int(ir.DataType.FLOAT8E4M3FN),
    )
    codes.type = ir.TensorType(ir.DataType.FLOAT4E2M1)
    scales.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    step = nodes.op("DequantizeLinear", [scales, second], Label.DEQUANTIZE_INPUT_SCALE)
    values = nodes.op(
        "DequantizeLinear", [codes, step], Label.DEQUANTIZE_INPUT, axis=-1, block_size=size
    )

    return _like(nodes.op("Cast", [values], Label.CAST_INPUT, to=int(nodes.dtype)), x)


def _mxfp8(nodes: LinearNodes, x: ir.Value, size: int) -> ir.Value:
    codes, exponents = nodes.custom(
        "TRT_MXFP8DynamicQuantize",
        [x],
        Label.QUANTIZE_INPUT,
        domain=TRT,
        outputs=2,
        axis=-1,
        block_size=size,
        output_dtype=int(ir.DataType.FLOAT8E4M3FN),
    )
    codes.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    exponents.type = ir.TensorType(ir.DataType.UINT8)

    return _like(
        mxfp8_values(nodes, codes, exponents, Label.DEQUANTIZE_INPUT, axis=-1, size=size), x
    )


def mxfp8_values(
    nodes: LinearNodes, codes: ir.Value, exponents: ir.Value, label: Label, *, axis: int, size: int
) -> ir.Value:
    """E4M3 codes times powers of two, in the dtype of the graph."""
    (values,) = nodes.custom(
        "TRT_MXFP8DequantizeLinear",
        [codes, exponents],
        label,
        domain=TRT,
        outputs=1,
        axis=axis,
        block_size=size,
        output_dtype=int(nodes.dtype),
    )
    return values


def _like(value: ir.Value, x: ir.Value) -> ir.Value:
    """Give ``value`` the rank and type of ``x``; sizes that padding changes are left to shape
    inference.
    """
    assert x.shape is not None
    value.shape, value.type = ir.Shape([None] * len(x.shape)), x.type
    return value
