"""Every scheme that target ``ort`` takes, as a graph of one linear in ONNX Runtime: its numbers,
and its kernels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from backends.onnx.targets import TARGETS
from calib.schemes import FLOAT4
from tests.backends.onnx.single import WIDTH, Single, accepted, preset, schemes, single
from tests.tiny import relative_l2
from tests.tolerances import LINEAR

W8A8 = "int8 weights per channel, int8 inputs per tensor"
INTEGER = ("MatMulIntegerToFloat", "QLinearMatMul")
WEIGHT_ONLY = ("MatMulNBits",)


def session(
    data: bytes, *, exact: bool, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def kernels(data: bytes, scratch: Path) -> Counter[str]:
    """What a default session executes."""
    path = scratch / "optimized.onnx"
    session(data, exact=False, optimized=path)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def output(case: Single, data: bytes) -> torch.Tensor:
    return torch.from_numpy(session(data, exact=True).run(None, {"x": case.inputs.numpy()})[0])


@pytest.mark.parametrize("words", accepted("ort"))
def test_the_graph_computes_what_the_artifact_says(words: str) -> None:
    case = single(schemes()[words])
    data = case.bytes("ort")
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    assert relative_l2(output(case, data), case.output()) <= LINEAR


@pytest.mark.parametrize("words", accepted("ort"))
def test_a_linear_runs_in_a_kernel_of_its_own_unless_there_is_a_warning(
    words: str, tmp_path: Path
) -> None:
    scheme = schemes()[words]
    found = kernels(single(scheme).bytes("ort"), tmp_path)
    fused = WEIGHT_ONLY if scheme.input is None else INTEGER
    warning = TARGETS["ort"].warning(scheme)
    assert (sum(found[kernel] for kernel in fused) == 1 and not found["DequantizeLinear"]) == (
        warning is None
    )
    if warning is not None:  # what the warning says that it falls back to, it does fall back to
        assert found["MatMulNBits" if "MatMulNBits)" in warning else "MatMul"] == 1


@pytest.mark.parametrize("size", [8, 16, 24, 32, 64, 128, 256, 512])
def test_the_sizes_of_blocks_that_are_fused_are_those_that_are_not_warned_of(
    size: int, tmp_path: Path
) -> None:
    scheme = preset(f"int4/{size}")
    found = kernels(single(scheme, width=2 * size).bytes("ort"), tmp_path)
    assert (found["MatMulNBits"] == 1) == (TARGETS["ort"].warning(scheme) is None)


@pytest.mark.parametrize("words", [words for words in accepted("ort") if "blocks" in words])
def test_columns_in_an_order_of_their_own(words: str) -> None:
    case = single(schemes()[words], order=True)
    assert relative_l2(output(case, case.bytes("ort")), case.output()) <= LINEAR


@pytest.mark.parametrize("name", ["int8", "w4a8", "int4-weight-only"])
def test_a_value_of_two_dimensions(name: str) -> None:
    """Which is what OPT gives its MLP."""
    case = single(preset(name))
    flat = Single(case.linear, case.inputs.flatten(0, 1))
    assert relative_l2(output(flat, flat.bytes("ort")), case.output().flatten(0, 1)) <= LINEAR


SHARED = {
    W8A8: ("MatMulIntegerToFloat", 1),
    f"{W8A8} with zero points": ("MatMulIntegerToFloat", 3),
    "int8 weights per channel, int8 inputs in 2 clusters": ("MatMulNBits", 3),
    "int4 weights in blocks of 128, int8 inputs per tensor": ("MatMulNBits", 1),
}
"""The kernel that unpacked linears run in, and how often three of them quantize what they all read.
"""


@pytest.mark.parametrize("words", SHARED)
def test_linears_that_share_their_input_are_fused_each(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = replace(TARGETS["ort"], packs=False)
    monkeypatch.setitem(TARGETS, "ort", apart)  # type: ignore[arg-type]
    found = kernels(single(schemes()[words]).bytes("ort", copies=3), tmp_path)
    kernel, quantizers = SHARED[words]
    assert (found[kernel], found["QuantizeLinear"]) == (3, quantizers)


def test_signed_pairs_that_are_merged_would_not_be_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why inputs are stored in uint8."""
    signed = replace(TARGETS["ort"], packs=False, unsigned_inputs=False)
    monkeypatch.setitem(TARGETS, "ort", signed)  # type: ignore[arg-type]
    found = kernels(single(preset("int8")).bytes("ort", copies=3), tmp_path)
    assert (found["MatMulIntegerToFloat"], found["MatMul"]) == (0, 3)


@pytest.mark.parametrize("words", [words for words in accepted("ort") if "int8 inputs" in words])
def test_inputs_beyond_their_range_are_clipped_to_minus_128_and_127(words: str) -> None:
    case = single(schemes()[words])
    wide = Single(case.linear, 3 * case.inputs)
    integers = (wide.inputs / case.linear.input_scale).round()
    assert integers.min() < -160
    assert integers.max() > 160
    assert relative_l2(output(wide, wide.bytes("ort")), wide.output()) <= LINEAR


def test_linears_that_share_their_input_and_its_scale_are_one(tmp_path: Path) -> None:
    case = single(preset("int8"))
    data = case.bytes("ort", copies=3)
    assert kernels(data, tmp_path)["MatMulIntegerToFloat"] == 1


def test_float4_has_nothing_to_run_in() -> None:
    """The refusal is about the runtime: forced, the graph does not load."""
    scheme = preset("nvfp4")
    assert scheme.weight.format == FLOAT4
    assert TARGETS["ort"].refusal(scheme) is not None
    with pytest.raises(Exception, match="TRT_FP4DynamicQuantize"):
        session(single(scheme, width=WIDTH).bytes("tensorrt"), exact=True)
