"""Int8 weights that are stored in uint8, for processors that clip sums of signed products."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from backends.altered import altered_parts
from backends.base import Int8Weights, Request
from backends.onnx import targets
from backends.onnx.backend import OnnxBackend
from backends.onnx.probes import ask_ort_saturation
from backends.onnx.read import read_linears
from backends.onnx.runner import OnnxModel
from backends.onnx.targets import TARGETS
from tests.backends.onnx.single import NAME, Single, accepted, preset, schemes, single
from tests.backends.onnx.test_schemes_ort import INTEGER, kernels, output
from tests.tiny import relative_l2
from tests.tolerances import LINEAR

MULTIPLIED = [
    words for words, scheme in accepted("ort").items() if TARGETS["ort"].multiplies(scheme)
]
"""Schemes of linears that ONNX Runtime multiplies as integers."""


def stored(data: bytes) -> set[int]:
    """As what the weights of a graph are stored."""
    initializers = onnx.load_from_string(data).graph.initializer
    return {each.data_type for each in initializers if each.name.endswith("weight")}


def extreme(case: Single) -> Single:
    """Inputs and weights at the ends of their ranges, of one sign: two products that meet in one
    sum need 17 bits.
    """
    weight = torch.full_like(case.linear.weight, 127)
    assert case.linear.input_scale is not None
    x = torch.full_like(case.inputs, 1e4) * case.linear.input_scale
    return Single(replace(case.linear, weight=weight), x)


@pytest.mark.parametrize("words", MULTIPLIED)
def test_they_multiply_exactly_in_an_integer_kernel_on_every_cpu(
    words: str, tmp_path: Path
) -> None:
    case = single(schemes()[words])
    data = case.bytes("ort", int8_weights="unsigned")
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    assert stored(data) == {onnx.TensorProto.UINT8}
    assert any(kernels(data, tmp_path)[kernel] for kernel in INTEGER)
    assert relative_l2(output(case, data), case.output()) <= LINEAR

    wide = extreme(case)
    data = wide.bytes("ort", int8_weights="unsigned")
    assert relative_l2(output(wide, data), wide.output()) <= LINEAR


def test_signed_ones_are_what_the_cpu_makes_of_them() -> None:
    """The question that ``auto`` hangs on, put to a linear that rotq writes."""
    wide = extreme(single(preset("int8")))
    found = relative_l2(output(wide, wide.bytes("ort", int8_weights="signed")), wide.output())
    clips = targets.ort_clips()
    assert clips == (ask_ort_saturation().approximation > targets._EXACT)
    assert (found > LINEAR) == clips


@pytest.mark.parametrize("words", MULTIPLIED)
@pytest.mark.parametrize("int8_weights", ["signed", "unsigned"])
def test_they_are_read_back_as_the_artifact_has_them(
    words: str, int8_weights: Int8Weights, tmp_path: Path
) -> None:
    case = single(schemes()[words])
    path = tmp_path / "model.onnx"
    path.write_bytes(case.bytes("ort", copies=3, int8_weights=int8_weights))
    found = read_linears(path)
    assert len(found) == 3
    assert altered_parts(found[NAME], case.linear) == []


def test_weights_that_are_multiplied_as_floats_are_stored_as_they_are() -> None:
    for words, scheme in accepted("ort").items():
        if words not in MULTIPLIED:
            case = single(scheme)
            signed, unsigned = (
                case.bytes("ort", int8_weights=each) for each in ("signed", "unsigned")
            )
            assert signed == unsigned, words


@pytest.mark.parametrize("clips", [True, False])
def test_auto_asks_the_runtime(clips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "ort_clips", lambda: clips)
    case = single(preset("int8"))
    expected = "unsigned" if clips else "signed"
    assert case.bytes("ort") == case.bytes("ort", int8_weights=expected)  # type: ignore[arg-type]
    assert stored(case.bytes("tensorrt")) == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("int8_weights", ["signed", "unsigned"])
def test_a_target_that_stores_them_in_one_way_refuses_another(int8_weights: Int8Weights) -> None:
    (reason,) = OnnxBackend().refusals(Request("tensorrt", int8_weights=int8_weights))
    assert reason.about == "option"
    assert reason.reason.endswith("takes int8 weights as int8")
    for target in ("ort", "openvino"):
        assert not OnnxBackend().refusals(Request(target, int8_weights=int8_weights))


def test_what_stands_in_for_another_runtime_does_not_clip(tmp_path: Path) -> None:
    """TensorRT's weights are signed; where this CPU would clip them, floats are multiplied."""
    wide = extreme(single(preset("int8")))
    path = tmp_path / "model.onnx"
    path.write_bytes(wide.bytes("tensorrt"))
    model = OnnxModel(path, exact=True, probed=True, stands_in="TensorRT runs on GPUs only")
    (found,) = model._run(["y"], {"x": wide.inputs})
    assert relative_l2(found, wide.output()) <= LINEAR
    sums = "floats" if targets.ort_clips() else "exact"
    assert model.session["sums of int8 products"] == sums
