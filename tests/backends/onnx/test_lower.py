"""Lowering one linear: what is put into the graph, in float16 and with TensorRT's own operators as
well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from backends.onnx.inputs import TRT
from backends.onnx.targets import TARGETS
from calib.arithmetic.grids import grid_of, grid_under, quantize, weight_limits
from calib.errors import BackendError
from calib.schemes import FLOAT4, FLOAT8, PerBlock, TensorScheme
from tests.backends.onnx.single import Single, accepted, schemes, single
from tests.tiny import relative_l2
from tests.tolerances import LINEAR, NAIVE

W8A8 = "int8 weights per channel, int8 inputs per tensor"
NVFP4 = "float4_e2m1 weights in blocks of 16, float4_e2m1 inputs in blocks of 16, e4m3 scales"
MXFP8 = "float8_e4m3 weights in blocks of 32, float8_e4m3 inputs in blocks of 32, e8m0 scales"
STANDARD = [words for words in accepted("tensorrt") if words not in (NVFP4, MXFP8)]


def labels(model: ir.Model) -> list[str]:
    return [str(node.name).removeprefix("linear/") for node in model.graph]


@pytest.mark.parametrize("words", STANDARD)
def test_float16_graphs_are_as_exact_as_float16_is(words: str) -> None:
    """Twice the error of the same fake quantization in torch's float16, where products are summed
    as exactly.
    """
    case = single(schemes()[words], torch.float16)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # ONNX Runtime has no kernels for float8
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        case.bytes("tensorrt"), options, providers=["CPUExecutionProvider"]
    )
    found = torch.from_numpy(session.run(None, {"x": case.inputs.numpy()})[0])
    assert found.dtype == torch.float16
    reference, bias = case.reference, case.linear.bias
    assert bias is not None
    entering = reference.quantize(case.inputs.float()).half()
    naive = entering @ case.linear.values().half().T + bias
    assert relative_l2(found, case.output()) <= NAIVE * relative_l2(naive, case.output())


class TRT_FP4DynamicQuantize(OpRun):  # the class bears the operator's name
    """E2M1 codes and E4M3 scales under a second-level scale, as TensorRT documents it."""

    op_domain = TRT

    def _run(
        self, x: np.ndarray, second: np.ndarray, axis: int, block_size: int, scale_type: int
    ) -> tuple[object, ...]:
        assert (axis, scale_type) == (-1, onnx.TensorProto.FLOAT8E4M3FN)
        rows = torch.from_numpy(x).float().reshape(-1, x.shape[-1])
        low, high = weight_limits(rows, PerBlock(block_size))
        grid = grid_under(torch.maximum(low.abs(), high.abs()), torch.tensor(second), FLOAT4)
        codes = quantize(
            rows, grid, TensorScheme(FLOAT4, PerBlock(block_size), scale_format="e4m3")
        )
        kind = ir.DataType.FLOAT4E2M1.numpy()
        scales = grid.scale.numpy().astype(ir.DataType.FLOAT8E4M3FN.numpy())
        return codes.reshape(x.shape).numpy().view(kind), scales.reshape(*x.shape[:-1], -1)


class TRT_MXFP8DynamicQuantize(OpRun):
    """E4M3 codes and exponents with a bias of 127."""

    op_domain = TRT

    def _run(
        self, x: np.ndarray, axis: int, block_size: int, output_dtype: int
    ) -> tuple[object, ...]:
        assert (axis, output_dtype) == (-1, onnx.TensorProto.FLOAT8E4M3FN)
        scheme = TensorScheme(FLOAT8, PerBlock(block_size), scale_format="e8m0")
        rows = torch.from_numpy(x).float().reshape(-1, x.shape[-1])
        grid = grid_of(*weight_limits(rows, scheme.granularity), scheme)
        codes = (
            quantize(rows, grid, scheme)
            .view(torch.uint8)
            .numpy()
            .view(ir.DataType.FLOAT8E4M3FN.numpy())
        )
        exponents = (grid.scale.log2() + 127).to(torch.uint8)
        return codes.reshape(x.shape), exponents.numpy().reshape(*x.shape[:-1], -1)


class TRT_MXFP8DequantizeLinear(OpRun):
    """Codes times powers of two."""

    op_domain = TRT

    def _run(
        self,
        codes: np.ndarray,
        exponents: np.ndarray,
        axis: int,
        block_size: int,
        output_dtype: int,
    ) -> tuple[object]:
        assert exponents.dtype == np.uint8
        scales = np.exp2(exponents.astype(np.float32) - 127).repeat(block_size, axis=axis)
        return ((codes.astype(np.float32) * scales).astype(ir.DataType(output_dtype).numpy()),)


@pytest.mark.parametrize("words", [NVFP4, MXFP8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_microscaled_formats_by_the_definition_of_their_operators(
    words: str, dtype: torch.dtype
) -> None:
    case = single(schemes()[words], dtype)
    model = onnx.load_from_string(case.bytes("tensorrt"))
    onnx.checker.check_model(model)
    operators = [TRT_FP4DynamicQuantize, TRT_MXFP8DynamicQuantize, TRT_MXFP8DequantizeLinear]
    (found,) = ReferenceEvaluator(model, new_ops=operators).run(None, {"x": case.inputs.numpy()})
    wanted = case.output()
    bound = LINEAR
    if dtype == torch.float16:
        entering = case.reference.quantize(case.inputs.float()).half()
        bias = case.linear.bias
        assert bias is not None
        bound = NAIVE * relative_l2(entering @ case.linear.values().half().T + bias, wanted)
    assert relative_l2(torch.from_numpy(found), wanted) <= bound


STORED = {
    W8A8: {"ort": "UINT8", "openvino": "INT8", "tensorrt": "INT8"},
    "int8 weights per channel, int8 inputs in 2 clusters": {"ort": "UINT8", "tensorrt": "INT8"},
    "int4 weights in blocks of 48, int8 inputs per tensor": {
        "ort": "UINT8",
        "openvino": "INT8",
        "tensorrt": "INT8",
    },
    "float8_e4m3 weights per tensor, float8_e4m3 inputs per tensor": {
        "ort": "FLOAT8E4M3FN",
        "tensorrt": "FLOAT8E4M3FN",
    },
}


@pytest.mark.parametrize("words", STORED)
def test_inputs_are_stored_as_the_target_multiplies_them(words: str) -> None:
    case, found = single(schemes()[words]), {}
    for target in STORED[words]:
        nodes = {str(node.name): node for node in case.graph(target).graph}
        zero = nodes["linear/QuantizeInput"].inputs[2]
        assert zero is not None
        assert zero is nodes["linear/DequantizeInput"].inputs[2]
        found[target] = zero.dtype.name
    assert found == STORED[words]


def test_float4_raises_the_opset_and_others_do_not() -> None:
    assert single(schemes()[NVFP4]).graph("tensorrt").opset_imports == {"": 23, TRT: 1}
    assert single(schemes()[MXFP8]).graph("tensorrt").opset_imports == {"": 21, TRT: 1}
    assert single(schemes()[W8A8]).graph("tensorrt").opset_imports == {"": 21}


BARRIERS = {
    W8A8: (),
    "int8 weights per channel, float inputs": (),
    "int8 weights in blocks of 48, int8 inputs per tensor": ("ort", "openvino", "tensorrt"),
    "int4 weights in blocks of 48, int8 inputs per tensor": ("ort", "openvino", "tensorrt"),
    "float8_e4m3 weights per tensor, float8_e4m3 inputs per tensor": ("ort",),
}


@pytest.mark.parametrize("words", BARRIERS)
def test_a_barrier_is_where_formats_have_no_common_product(words: str) -> None:
    for target in TARGETS:
        if TARGETS[target].refusal(schemes()[words]) is None:
            assert ("Barrier" in labels(single(schemes()[words]).graph(target))) == (
                target in BARRIERS[words]
            ), target


def test_blocks_are_filled_up_where_the_target_wants_them_whole() -> None:
    case = single(schemes()["int4 weights in blocks of 64, float inputs"])
    rows = {
        target: case.graph(target).graph.initializers["linear.weight"].shape for target in TARGETS
    }
    assert rows == {"ort": (96, 24), "openvino": (128, 24), "tensorrt": (128, 24)}
    assert [target for target in TARGETS if "Pad" in labels(case.graph(target))] == [
        "openvino",
        "tensorrt",
    ]


@pytest.mark.parametrize("part", ["weight_scale", "input_scale"])
@pytest.mark.parametrize(("value", "becomes"), [(1e-9, "0"), (1e6, "inf")])
def test_a_scale_that_vanishes_or_overflows_in_float16_is_an_error(
    part: str, value: float, becomes: str
) -> None:
    case = single(schemes()[W8A8], torch.float16)
    scale: Tensor = getattr(case.linear, part).float().clone()
    scale.view(-1)[0] = value
    parts: dict[str, Any] = {part: scale}
    changed = Single(replace(case.linear, **parts), case.inputs)
    with pytest.raises(
        BackendError, match=rf"of 'linear.{part}' becomes {becomes} in float16"
    ) as caught:
        changed.graph("tensorrt")
    assert "--dtype float16" in (caught.value.hint or "")


def test_an_opset_that_is_too_low_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "ort", replace(TARGETS["ort"], opset=20))
    with pytest.raises(BackendError, match="opset 20 cannot express quantized weights"):
        single(schemes()[W8A8]).graph("ort")
