"""What ``rotq backends`` says of target ``modelopt``, and what is refused of a model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from backends.rules import tensor_schemes
from backends.safetensors.backend import SafetensorsBackend
from backends.safetensors.modelopt.algorithms import algorithm_of
from backends.safetensors.modelopt.limits import rotation_refusal
from backends.safetensors.modelopt.tensors import format_of
from calib.errors import BackendError
from calib.quantizing.plan import customised
from calib.schemes import (
    INT8,
    KV_SCHEMES,
    LINEAR_SCHEMES,
    SCHEMES,
    LinearScheme,
    PerChannel,
    TensorScheme,
)
from tests.answers import cache_refusal, linear_refusal, linear_warning, model_refusal
from tests.backends.safetensors.compressed_tensors.compressed_support import artifact
from tests.backends.safetensors.modelopt.modelopt_support import TARGET, calibrated, tensors_of

_ALGORITHMS = {
    "int8": "W8A8_SQ_PER_CHANNEL",
    "int8-weight-only": "W8A16",
    "int4-weight-only": "W4A16_AWQ",
    "w4a8-float8": "W4A8_AWQ",
    "float8": "FP8",
    "float8-dynamic": "FP8_PER_CHANNEL_PER_TOKEN",
    "nvfp4": "NVFP4",
    "mxfp8": "MXFP8",
}


def _linear(name: str, **controls: Any) -> LinearScheme:
    found = customised(SCHEMES[name], **controls).linear
    assert found is not None
    return found


def _tensors(name: str) -> list[TensorScheme]:
    return tensor_schemes(LINEAR_SCHEMES[name])


@pytest.mark.parametrize("name", LINEAR_SCHEMES)
def test_presets_that_are_written_have_a_format(name: str) -> None:
    found = algorithm_of(LINEAR_SCHEMES[name])
    assert (None if found is None else found.name) == _ALGORITHMS.get(name)
    assert (linear_refusal(SafetensorsBackend(), LINEAR_SCHEMES[name], TARGET) is None) == (
        name in _ALGORITHMS
    )


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (_linear("int8", weight_symmetric=False), "no zero points"),
        (_linear("int8", activation_symmetric=False), "no zero points"),
        (_linear("int8", activation_granularity="cluster:4"), "sets of channels"),
        (_linear("int8-dynamic"), "per token for FP8"),
        (_linear("w4a4"), "per token for FP8"),
        (_linear("mxfp4"), "no reader knows"),
        (
            LinearScheme(
                *(replace(tensor, scale_format="e8m0-floor") for tensor in _tensors("mxfp8"))
            ),
            "never down",
        ),
        (
            replace(_linear("int4-weight-only"), weight=_linear("w4a4").weight),
            "in blocks of input features only",
        ),
        (_linear("w4a8"), "FP8 inputs of one calibrated scale"),
        (replace(_linear("int8"), weight=TensorScheme(INT8, PerChannel(1))), "per output channel"),
        (_linear("int8", block_size=32), "per output channel"),
        (replace(_linear("float8"), input=None), "inputs included"),
        (replace(_linear("float8"), input=_linear("int8").input), "inputs included"),
        (replace(_linear("nvfp4"), input=_linear("mxfp8").input), "in blocks of 16"),
    ],
)
def test_what_the_format_has_not_is_refused(scheme: LinearScheme, words: str) -> None:
    reason = linear_refusal(SafetensorsBackend(), scheme, TARGET)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (_linear("int8"), "neither vLLM 0.33 nor"),
        (_linear("int8-weight-only"), "vLLM 0.33 does not"),
        (_linear("int4-weight-only", block_size=64), "vLLM 0.33 does not"),
        (_linear("w4a8-float8"), "vLLM 0.33 does not"),
        (_linear("float8"), None),
        (_linear("float8-dynamic"), None),
        (_linear("nvfp4"), None),
        (replace(_linear("nvfp4"), input=None), "TensorRT-LLM was not seen to"),
        (_linear("mxfp8"), "TensorRT-LLM was not seen to"),
    ],
)
def test_what_a_reader_does_not_load_is_warned_of(scheme: LinearScheme, words: str | None) -> None:
    assert linear_refusal(SafetensorsBackend(), scheme, TARGET) is None
    warning = linear_warning(SafetensorsBackend(), scheme, TARGET)
    assert (warning is None) if words is None else (warning is not None and words in warning)


def test_caches_are_float8() -> None:
    refusals = {
        name: cache_refusal(SafetensorsBackend(), scheme, TARGET)
        for name, scheme in KV_SCHEMES.items()
    }
    assert {name for name, refusal in refusals.items() if refusal is None} == {"float8"}


def test_rotations_that_run_online_are_refused() -> None:
    assert [kind for kind in ("r1", "r2", "r3", "r4") if rotation_refusal(kind)] == ["r3", "r4"]


@pytest.mark.parametrize("kind", ["r3", "r4"])
def test_an_artifact_with_an_online_rotation_is_not_written(kind: Any) -> None:
    with pytest.raises(
        BackendError, match=f"{kind.upper()}: the format has no place for a rotation"
    ) as found:
        tensors_of(artifact("llama", "int8", kinds=["r1", "r2", kind]))
    assert kind in str(found.value.hint)


def test_an_artifact_with_folded_rotations_is_written() -> None:
    assert tensors_of(artifact("llama", "int8", kinds=["r1", "r2"]))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            ("llama", "int4-weight-only", {"block_size": 48}),
            "blocks of 48 do not divide the 64 input features",
        ),
        (
            ("llama", "int4-weight-only", {"weights": "gptq:static_groups=false"}),
            "order of the input features",
        ),
        (("llama", "float", {"kv": "float8"}), "KV cache with float linears"),
        (
            ("llama", "int8", {"overrides": {"*.q_proj": "int8-dynamic"}}),
            "no format for 'model.layers.0.self_attn.q_proj'",
        ),
    ],
)
def test_what_only_the_model_shows_is_refused(
    case: tuple[str, str, dict[str, Any]], words: str
) -> None:
    family, scheme, controls = case
    with pytest.raises(BackendError, match=words) as found:
        tensors_of(calibrated(family, scheme, **controls).artifact)
    assert found.value.hint


def test_an_odd_number_of_outputs_cannot_be_packed() -> None:
    linear = next(iter(calibrated("llama", "int4-weight-only").artifact.linears.values()))
    assert format_of(linear).name == "W4A16_AWQ"
    odd = replace(linear, weight=linear.weight[:-1], weight_scale=linear.weight_scale[:-1])
    with pytest.raises(BackendError, match=rf"by two outputs, and '{linear.name}' has 63"):
        format_of(odd)


def test_experts_in_several_formats_are_refused() -> None:
    overrides = {"*.experts.down_proj.*": "int8-weight-only"}
    model = calibrated("mixtral", "float8", overrides=overrides).artifact
    with pytest.raises(
        BackendError, match=r"block_sparse_moe\.experts' are quantized in several ways"
    ):
        tensors_of(model)


_EXPERT = "model.layers.0.mlp.experts.{}_proj.0"


@pytest.mark.parametrize(
    ("family", "linears", "words"),
    [
        ("llama", {"model.embed_tokens": "int8-weight-only"}, "embedding"),
        ("mixtral", {_EXPERT.format("down"): "int8"}, "all experts"),
        (
            "llama",
            {"model.layers.1.mlp.down_proj": "int4-weight-only"},
            "blocks of 128 do not divide the 88",
        ),
        ("llama", {"model.layers.1.mlp.down_proj": "mxfp8"}, "blocks of 32 do not divide the 88"),
    ],
)
def test_models_are_refused_before_calibration(
    family: str, linears: dict[str, str], words: str
) -> None:
    config = artifact(family, "float").config
    reason = model_refusal(
        SafetensorsBackend(), config, {n: LINEAR_SCHEMES[s] for n, s in linears.items()}, TARGET
    )
    assert reason is not None
    assert words in reason.reason


def test_most_models_are_not_refused() -> None:
    linears = {"model.layers.0.self_attn.q_proj": LINEAR_SCHEMES["int8"]}
    assert (
        model_refusal(SafetensorsBackend(), artifact("llama", "float").config, linears, TARGET)
        is None
    )


def test_limits_are_free_of_torch() -> None:
    code = (
        "import sys; import backends.safetensors.modelopt.limits; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
