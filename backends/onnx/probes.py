"""Asking ONNX Runtime and OpenVINO what they make of a quantized linear, with a graph of one.
Torch-free.

The graph is the one that :mod:`backends.onnx.lower` writes for such a linear (a test holds both
against each other), with random integers. Each question takes some milliseconds;
:mod:`backends.onnx.asking` keeps the answers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from backends.onnx.asking import Answer, Form
from calib.schemes import INT4, LinearScheme, PerBlock, PerChannel, PerCluster, TensorScheme

_OUT = 24
_WIDTH = 96
_TOKENS = (1, 9)
"""Rows that are run: decoding and a prompt may take kernels of their own."""
_DTYPES = {
    "int8": onnx.TensorProto.INT8,
    "int4": onnx.TensorProto.INT4,
    "float8_e4m3": onnx.TensorProto.FLOAT8E4M3FN,
}
_LARGEST_FLOAT8 = 0x77
"""Codes up to here are finite, of either sign."""
_ORT_INTEGER = ("MatMulIntegerToFloat", "QLinearMatMul")
_ORT_WEIGHTS = "MatMulNBits"
_OV_INTEGER = frozenset({"i8", "u8", "i4", "u4"})
_STEP = 0.02
"""Scale of the inputs: normal ones then fill the range of int8 up to a few that are clipped."""


def ask_ort(scheme: LinearScheme, form: Form) -> Answer:
    """What a default session of ONNX Runtime executes a linear of ``scheme`` with.

    Args:
        scheme: with scales in float32, calibrated ones for the input.
        form: how it is written.
    """
    graph = linear_graph(scheme, form)
    try:
        nodes = _ort_optimized(graph)
        weights = next((node for node in nodes if node.op_type == _ORT_WEIGHTS), None)
        approximation = 0.0 if weights is None else _ort_approximation(graph)
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        return Answer("", fused=False, refused=_line(error))
    found = {node.op_type for node in nodes}
    own = (_ORT_WEIGHTS,) if scheme.input is None else _ORT_INTEGER
    kernel = next((name for name in (*_ORT_INTEGER, _ORT_WEIGHTS, "MatMul") if name in found), "")
    fused = kernel in own and "DequantizeLinear" not in found
    level = 0 if weights is None else _attribute(weights, "accuracy_level")
    return Answer(kernel, fused=fused, approximation=approximation, level=level)


def ask_ort_saturation() -> Answer:
    """Whether ONNX Runtime's product of uint8 and int8 on this CPU keeps the sum of two products
    that int16 does not.

    x86 processors without VNNI add pairs of products in 16 bits, and clip them to 32767
    (:mod:`backends.onnx.weights`).
    """
    graph, x, wanted = _largest()
    try:
        kernels = {node.op_type for node in _ort_optimized(graph)}
        kernel = next((name for name in _ORT_INTEGER if name in kernels), "")
        found = _ort_session(graph, exact=False).run(None, {"x": x})[0]
    except Exception as error:
        return Answer("", fused=False, refused=_line(error))
    return Answer(
        kernel, fused=bool(kernel), approximation=float(abs(found - wanted).max() / wanted)
    )


def ask_openvino_saturation() -> Answer:
    """The same of OpenVINO's CPU plugin."""
    import openvino as ov

    from backends.onnx import openvino_options as options

    graph, x, wanted = _largest()
    try:
        model = ov.Core().read_model(graph.SerializeToString())
        compiled = ov.Core().compile_model(model, options.DEVICE, options.AS_WRITTEN)
        kernel = _openvino_product(compiled)
        found = compiled([x])[0]
    except RuntimeError as error:
        return Answer("", fused=False, refused=_line(error))
    fused = kernel.endswith((" i8", " u8"))
    return Answer(kernel, fused=fused, approximation=float(abs(found - wanted).max() / wanted))


def _largest() -> tuple[onnx.ModelProto, Any, float]:
    """A linear of int8, inputs, and each of its outputs: the largest codes of both, throughout."""
    width = 64
    scales = {"xs": _float("xs", [], [1.0]), "s": _float("s", [1], [1.0])}
    weight = _tensor("w", onnx.TensorProto.INT8, [width, 1], np.full(width, 127, np.int8))
    zero = _tensor("xz", onnx.TensorProto.UINT8, [], np.array(0, np.uint8))
    body = _ROUND + "v = DequantizeLinear <axis = 1> (w, s)\n y = MatMul(d, v)"
    graph = _model(body, width, 1, [*scales.values(), weight, zero])
    return graph, np.full((1, 4, width), 255, np.float32), 255 * 127 * width


def ask_openvino(scheme: LinearScheme, form: Form) -> Answer:
    """What a compiled model of OpenVINO's CPU plugin, as a user gets it, executes a linear of
    ``scheme`` with."""
    import openvino as ov

    from backends.onnx import openvino_options as options

    graph = linear_graph(scheme, form)
    try:
        model = ov.Core().read_model(graph.SerializeToString())
        compiled = ov.Core().compile_model(model, options.DEVICE, options.AS_A_USER)
        kernel = _openvino_product(compiled)
    except RuntimeError as error:
        return Answer("", fused=False, refused=_line(error))
    if not kernel:
        return Answer("", fused=False)
    _, entering, weight = kernel.split()
    integer = weight in _OV_INTEGER
    fused = integer and (entering in _OV_INTEGER) == (scheme.input is not None)
    return Answer(kernel, fused=fused)


def _openvino_product(compiled: Any) -> str:
    """The operator that multiplies in a compiled model of one linear, and the types of its
    operands; empty where there is not one."""
    operators = compiled.get_runtime_model().get_ops()
    products = [op for op in operators if _kind(op) in ("FullyConnected", "MatMul")]
    if len(products) != 1:
        return ""
    entering, weight = (_type(source) for source in products[0].inputs()[:2])
    return f"{_kind(products[0])} {entering} {weight}"


_ROUND = "q = QuantizeLinear(x, xs, xz)\n d = DequantizeLinear(q, xs, xz)\n "


def linear_graph(scheme: LinearScheme, form: Form) -> onnx.ModelProto:
    """One linear of ``scheme`` with a bias, as the ONNX backend writes it."""
    block = (
        scheme.weight.granularity.size if isinstance(scheme.weight.granularity, PerBlock) else None
    )
    width = 2 * block if block else _WIDTH
    body, constants = "", []
    if scheme.input is not None:
        axis = isinstance(scheme.input.granularity, PerCluster)
        body += _ROUND.replace("Linear(", "Linear <axis = 2> (") if axis else _ROUND
        constants += _input_constants(
            scheme.input, width if axis else None, unsigned=form.unsigned_inputs
        )

    entering = "x" if scheme.input is None else "d"
    if form.barrier and scheme.input is not None:
        body, entering = f"{body}b = Add(d, nothing)\n ", "b"
        constants.append(_float("nothing", [width], np.zeros(width)))
    constants += _weight_constants(scheme.weight, width, block, unsigned=form.unsigned_weights)
    inputs = "w, s" if scheme.weight.symmetric and not form.unsigned_weights else "w, s, z"
    attributes = {PerBlock: f"<axis = 0, block_size = {block}>", PerChannel: "<axis = 1>"}
    written = attributes.get(type(scheme.weight.granularity), "")
    body += (
        f"v = DequantizeLinear {written} ({inputs})\n m = MatMul({entering}, v)\n y = Add(m, bias)"
    )
    constants.append(_float("bias", [_OUT], _random().normal(size=_OUT)))
    return _model(body, width, _OUT, constants)


def _model(body: str, width: int, out: int, constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    text = (
        '<ir_version: 10, opset_import: ["": 21]> '
        f"g (float[batch, sequence, {width}] x) => (float[batch, sequence, {out}] y) {{ {body} }}"
    )
    model: onnx.ModelProto = onnx.parser.parse_model(text)
    model.graph.initializer.extend(constants)
    return model


def _input_constants(
    scheme: TensorScheme, width: int | None, *, unsigned: bool
) -> list[onnx.TensorProto]:
    """Scale and zero point of a rounded input, one for each feature where there is a ``width``."""
    shape, count = ([], 1) if width is None else ([width], width)
    scale = _float("xs", shape, np.full(count, _STEP))
    point = 0 if scheme.symmetric else 5
    if scheme.format.name == "int8" and unsigned:
        codes: Any = np.full(count, point + 128, np.uint8)
        return [scale, _tensor("xz", onnx.TensorProto.UINT8, shape, codes)]
    packed = scheme.format == INT4  # two in a byte
    codes = np.full(
        (count + 1) // 2 if packed else count, point * 17 if packed else point, np.uint8
    )
    return [scale, _tensor("xz", _DTYPES[scheme.format.name], shape, codes)]


def _weight_constants(
    scheme: TensorScheme, width: int, block: int | None, *, unsigned: bool
) -> list[onnx.TensorProto]:
    """Codes ``[width, out]``, scales and zero points, as random as a weight's."""
    random = _random()
    count = width * _OUT * scheme.format.bits // 8
    codes = random.integers(0, 256, count, dtype=np.uint8)
    if scheme.format.kind == "float":
        codes = (codes & 0x80) | np.minimum(codes & 0x7F, _LARGEST_FLOAT8).astype(np.uint8)
    shape = [width // block, _OUT] if block else [_OUT]
    shape = shape if isinstance(scheme.granularity, PerBlock | PerChannel) else []
    size = int(np.prod(shape, dtype=int))
    dtype = onnx.TensorProto.UINT8 if unsigned else _DTYPES[scheme.format.name]
    found = [
        _tensor("w", dtype, [width, _OUT], codes),
        _float("s", shape, random.uniform(0.01, 0.02, size)),
    ]
    if unsigned or not scheme.symmetric:
        stored = (size + 1) // 2 if scheme.format == INT4 else size
        points = random.integers(0, 1 if scheme.symmetric else 3, stored) + (128 if unsigned else 0)
        points = points.astype(np.uint8)
        found.append(_tensor("z", dtype, shape, points))
    return found


def _ort_optimized(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of the graph that a default session executes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "optimized.onnx"
        _ort_session(graph, exact=False, optimized=path)
        return list(onnx.load(path).graph.node)


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def _ort_approximation(graph: onnx.ModelProto) -> float:
    """Relative L2 between the default session's output and that with arithmetic as written."""
    width = graph.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    default, exact = (_ort_session(graph, exact=exact) for exact in (False, True))
    squares = reference = 0.0
    for tokens in _TOKENS:
        x = _random().normal(size=(1, tokens, width)).astype(np.float32)
        found, wanted = (session.run(None, {"x": x})[0] for session in (default, exact))
        squares += float(np.square(found - wanted).sum())
        reference += float(np.square(wanted).sum())
    return float((squares / reference) ** 0.5)


def _ort_session(graph: onnx.ModelProto, *, exact: bool, optimized: Path | None = None) -> Any:
    import onnxruntime as ort

    from backends.onnx.ort_options import session_options

    options = session_options(exact=exact)
    options.log_severity_level = 4  # what it refuses is an answer
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _kind(op: Any) -> str:
    return str(op.get_rt_info()["layerType"].value)


def _type(source: Any) -> str:
    return str(source.get_element_type().get_type_name())


def _float(name: str, shape: list[int], values: Any) -> onnx.TensorProto:
    return _tensor(name, onnx.TensorProto.FLOAT, shape, np.asarray(values, np.float32))


def _tensor(name: str, dtype: int, shape: list[int], values: Any) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=dtype, dims=shape, raw_data=values.tobytes())


def _random() -> np.random.Generator:
    return np.random.default_rng(3)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
