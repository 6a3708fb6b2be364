"""What target ``tensorrt`` takes, by TensorRT-RTX's parser and builder: no engine is run, as that
needs a GPU.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from backends.base import WriteOptions
from backends.onnx import tensorrt_rtx
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import MODEL_FILE
from backends.onnx.targets import TARGETS
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.errors import BackendError
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.schemes import FLOAT4, FLOAT8, LinearScheme, scheme_named
from tests.backends.onnx.single import Single, accepted, preset, schemes, single
from tests.tiny import PROVENANCE, fuse_tiny, make_tiny, token_rows, wide_llama

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
pytestmark = pytest.mark.runtimes
ALL = tensorrt_rtx.CAPABILITIES


def least(scheme: LinearScheme) -> str:
    """The oldest compute capability that has the formats of ``scheme``."""
    formats = {tensor.format for tensor in (scheme.weight, scheme.input) if tensor is not None}
    return "12.0" if FLOAT4 in formats else "8.9" if FLOAT8 in formats else "8.6"


def write(case: Single, folder: Path, target: str = "tensorrt") -> Path:
    path = folder / MODEL_FILE
    path.write_bytes(case.bytes(target))
    return path


@pytest.mark.parametrize("words", accepted("tensorrt"))
def test_a_linear_of_every_scheme_is_built(words: str, tmp_path: Path) -> None:
    scheme = schemes()[words]
    path = write(single(scheme, torch.float16), tmp_path)
    assert tensorrt_rtx.build(path, least(scheme))


@pytest.mark.parametrize("name", ["float8", "nvfp4", "mxfp8"])
def test_formats_are_built_from_the_gpus_on_that_have_them(name: str, tmp_path: Path) -> None:
    scheme = preset(name)
    path = write(single(scheme, torch.float16), tmp_path)
    older = ALL[: ALL.index(least(scheme))]
    for capability in older:
        with pytest.raises(BackendError, match=f"for compute capability {capability}"):
            tensorrt_rtx.build(path, capability)


REFUSED = {
    "zero points of weights": (
        "int8 weights per channel with zero points, float inputs",
        "zero point",
    ),
    "zero points of inputs": (
        "int8 weights per channel, int8 inputs per tensor with zero points",
        "zero point",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_are_about_the_runtime(what: str, tmp_path: Path) -> None:
    words, reason = REFUSED[what]
    assert TARGETS["tensorrt"].refusal(schemes()[words]) is not None
    with pytest.raises(BackendError, match=reason):
        tensorrt_rtx.build(write(single(schemes()[words], torch.float16), tmp_path), "8.6")


def test_blocks_of_one_feature(tmp_path: Path) -> None:
    scheme = preset("int4/1")
    assert TARGETS["tensorrt"].refusal(scheme) is not None
    with pytest.raises(BackendError, match="cannot parse"):
        tensorrt_rtx.build(write(single(scheme, torch.float16), tmp_path), "8.6")


def test_without_the_barrier_nothing_is_built(tmp_path: Path) -> None:
    """Which is why it is there."""
    case = single(schemes()["int4 weights in blocks of 48, int8 inputs per tensor"], torch.float16)
    model = case.graph("tensorrt")
    (barrier,) = [node for node in model.graph if node.name == "linear/Barrier"]
    before = barrier.inputs[0]
    assert before is not None
    barrier.outputs[0].replace_all_uses_with(before)
    path = tmp_path / MODEL_FILE
    ir.save(model, path)
    with pytest.raises(BackendError, match="cannot build"):
        tensorrt_rtx.build(path, "8.6")


MODELS: dict[str, tuple[str, dict[str, str], str | None]] = {
    **{
        name: (name, {}, None)
        for name in ("float", "int8", "int4-weight-only", "w4a8", "float8", "nvfp4", "mxfp8")
    },
    "cache": ("int8", {}, "int8"),
    "float8 cache": ("float8", {}, "float8"),
    "head and embedding": (
        "int8-weight-only",
        {"model.embed_tokens": "int8-weight-only", "lm_head": "int4-weight-only"},
        None,
    ),
    "mixed": (
        "nvfp4",
        {"*.mlp.*": "float8", "*.q_proj": "float", "*.k_proj": "w4a8", "*.v_proj": "mxfp8"},
        None,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_built(name: str, tmp_path: Path) -> None:
    base, overrides, kv = MODELS[name]
    config = wide_llama()
    config.num_hidden_layers = 1
    fused = fuse_tiny(make_tiny(config), ["r1", "r2", "r3", "r4"], dtype=torch.float16)
    how = resolve(scheme_named(base), fused.wiring, overrides=overrides, kv=kv)
    quantized = quantize_model(
        fused, how, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
    )
    OnnxBackend().write(quantized, tmp_path, WriteOptions("tensorrt"))
    capability = max(
        [least(scheme) for scheme in quantized.schemes().values()], key=float, default="8.6"
    )
    assert tensorrt_rtx.build(tmp_path / MODEL_FILE, capability)
