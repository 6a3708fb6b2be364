"""Which presets the targets take, which of them they warn of, and what they say of a cache."""

from __future__ import annotations

import pytest

from backends.asking import refusal_of
from backends.base import Request
from backends.onnx.backend import OnnxBackend
from backends.onnx.targets import TARGETS, openvino_clips
from calib.schemes import KV_SCHEMES, SCHEMES
from tests.answers import cache_refusal, linear_refusal, linear_warning

BACKEND = OnnxBackend()
TAKEN = {
    "ort": {"int8", "int8-weight-only", "int4-weight-only", "w4a8", "w4a8-float8", "float8"},
    "openvino": {"int8", "int8-weight-only", "int4-weight-only", "w4a8"},
    "tensorrt": {
        "int8",
        "int8-weight-only",
        "int4-weight-only",
        "w4a8",
        "w4a8-float8",
        "float8",
        "nvfp4",
        "mxfp8",
    },
}
WARNED = {
    "ort": {"w4a8", "w4a8-float8", "float8"},
    "openvino": {"w4a8"},
    "tensorrt": {"w4a8", "w4a8-float8"},
}
CACHES = {"ort": {"int8"}, "openvino": {"int8"}, "tensorrt": {"int8", "float8"}}
QUANTIZING = {name: scheme.linear for name, scheme in SCHEMES.items() if scheme.linear is not None}


@pytest.mark.parametrize("target", TARGETS)
def test_presets_that_are_taken(target: str) -> None:
    assert {
        name
        for name, scheme in QUANTIZING.items()
        if linear_refusal(BACKEND, scheme, target) is None
    } == TAKEN[target]


@pytest.mark.parametrize("target", TARGETS)
def test_presets_that_are_warned_of_name_what_is_executed_instead(target: str) -> None:
    warnings = {name: linear_warning(BACKEND, QUANTIZING[name], target) for name in TAKEN[target]}
    warned = {name for name, warning in warnings.items() if warning is not None}
    # asked on a CPU without VNNI, OpenVINO multiplies what is exact there as if it were float
    by_cpu = {"int8"} if target == "openvino" and openvino_clips() else set()
    assert WARNED[target] <= warned <= WARNED[target] | by_cpu
    executed = {"ort": "Mul", "openvino": "FullyConnected", "tensorrt": "float16"}[target]
    assert all(executed in warning for warning in warnings.values() if warning is not None)


@pytest.mark.parametrize("target", TARGETS)
def test_caches_that_are_taken(target: str) -> None:
    refusals = {name: cache_refusal(BACKEND, scheme, target) for name, scheme in KV_SCHEMES.items()}
    assert {name for name, refusal in refusals.items() if refusal is None} == CACHES[target]


def test_one_buffer_for_keys_and_values_is_for_onnx_runtime() -> None:
    assert [
        target
        for target in TARGETS
        if refusal_of(BACKEND, Request(target, kv_buffer="shared")) is None
    ] == ["ort"]


def test_the_graph_is_in_what_the_target_computes_in() -> None:
    assert {target: BACKEND.compute_dtype(target) for target in TARGETS} == {
        "ort": "float32",
        "openvino": "float32",
        "tensorrt": "float16",
    }
