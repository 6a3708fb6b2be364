"""What runtimes make of the linears, looked at in the runtimes: everything but plain decoder
linears.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from backends.base import Fusion, WriteOptions
from backends.onnx.backend import OnnxBackend
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.errors import BackendError
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.schemes import scheme_named
from tests.tiny import CONFIGS, PROVENANCE, fuse_tiny, make_tiny, token_rows

HEAD, TABLE = "lm_head", "model.embed_tokens"
DOWN = "*.down_proj"


def export(
    folder: Path, name: str, scheme: str, overrides: Mapping[str, str], target: str = "ort"
) -> int:
    """Write a tiny model; the number of its quantized linears, embeddings aside."""
    fused = fuse_tiny(make_tiny(CONFIGS[name]()))
    plan = resolve(scheme_named(scheme), fused.wiring, overrides=dict(overrides))
    quantized = quantize_model(
        fused, plan, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
    )
    OnnxBackend().write(quantized, folder, WriteOptions(target))
    return len(quantized.linears) - (TABLE in quantized.linears)


def fusion(folder: Path, target: str = "ort") -> Fusion:
    found = OnnxBackend().fusion(folder, target)
    assert found is not None
    return found


@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only", "int4-weight-only"])
def test_the_head_is_fused_like_any_linear(tmp_path: Path, scheme: str) -> None:
    count = export(tmp_path, "llama", "int8", {HEAD: scheme})
    found = fusion(tmp_path)
    assert (found.quantized, found.unfused) == (count, [])
    products = 2 * 5  # query, key and value are one
    expected = {"int8": {"MatMulIntegerToFloat": products + 1}}.get(
        scheme, {"MatMulIntegerToFloat": products, "MatMulNBits": 1}
    )
    assert {kernel: found.kernels[kernel] for kernel in expected} == expected


def test_a_quantized_embedding_is_no_linear_that_was_left(tmp_path: Path) -> None:
    count = export(tmp_path, "llama", "int8", {TABLE: "int8-weight-only"})
    found = fusion(tmp_path)
    assert (found.quantized, found.unfused) == (count, [])


def test_experts_are_counted_one_by_one(tmp_path: Path) -> None:
    count = export(tmp_path, "qwen3_moe", "int8-weight-only", {})
    found = fusion(tmp_path)
    assert (found.quantized, found.unfused) == (count, [])
    # two layers' attention, one dense MLP, gate_up and down of four experts
    assert count == 2 * 4 + 3 + 2 * 4
    # query, key and value are one, and gate and up
    assert found.kernels["MatMulNBits"] == 2 * 2 + 2 + 2 * 4


def test_what_is_dequantized_on_every_run_is_named(tmp_path: Path) -> None:
    """No kernel takes a float8 weight; the other linears are fused all the same."""
    export(tmp_path, "llama", "int8", {DOWN: "float8"})
    left = fusion(tmp_path).unfused
    assert left == [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]


@pytest.mark.runtimes
class TestOpenVino:
    """The same in OpenVINO."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("openvino", reason="OpenVINO is not installed")

    def test_head_embedding_and_linears_are_fused(self, tmp_path: Path) -> None:
        count = export(
            tmp_path,
            "llama",
            "int8",
            {HEAD: "int8-weight-only", TABLE: "int8-weight-only"},
            "openvino",
        )
        found = fusion(tmp_path, "openvino")
        assert (found.quantized, found.unfused) == (count, [])

    def test_what_is_converted_on_every_run_is_named(self, tmp_path: Path) -> None:
        export(tmp_path, "llama", "int8", {DOWN: "float8"}, "openvino")
        left = fusion(tmp_path, "openvino").unfused
        assert left == [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]


def test_a_full_temporary_folder_is_no_fault_of_the_graph(tmp_path: Path) -> None:
    export(tmp_path, "llama", "int8", {})
    resource = pytest.importorskip("resource", reason="there are no limits on the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        with pytest.raises(BackendError, match="the disk is full, or a limit"):
            fusion(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
