"""What a bundle holds is what the artifact held: integers, scales and float tensors, to the last
bit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.safetensors.backend import SafetensorsBackend
from backends.safetensors.compressed_tensors.layout import CompressedTensorsLayout
from backends.safetensors.manifest import Manifest
from backends.safetensors.names import Names
from calib.artifact import LINEAR_PARTS, QuantizedLinear, QuantizedModel
from calib.errors import BackendError
from calib.schemes import LINEAR_SCHEMES, tensor_scheme_to_dict
from tests.answers import model_refusal
from tests.backends.safetensors.compressed_tensors.compressed_support import (
    BOTH,
    artifact,
    equal,
    quantization_config,
    tensors_of,
    written,
)

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int8": ("llama", "int8", {}),
    "int8-dynamic": ("qwen2", "int8-dynamic", {}),
    "int8-zero-points": (
        "llama",
        "int8",
        {"weight_symmetric": False, "activation_symmetric": False},
    ),
    "int8-weight-only": ("qwen2", "int8-weight-only", {}),
    "int4": ("llama", "int4-weight-only", {"block_size": 8}),
    "int4-zero-points": ("qwen2", "int4-weight-only", {"block_size": 8, "weight_symmetric": False}),
    "int4-whole-rows": ("llama", "int4-weight-only", {"weight_symmetric": False}),
    "w4a8": ("llama", "w4a8", {}),
    "w4a8-float8": ("qwen2", "w4a8-float8", {"block_size": 8}),
    "w4a4": ("llama", "w4a4", {}),
    "float8": ("qwen2", "float8", {}),
    "float8-dynamic": ("llama", "float8-dynamic", {}),
    "nvfp4": ("wide", "nvfp4", {}),
    "mxfp4": ("wide", "mxfp4", {}),
    "mxfp8": ("wide", "mxfp8", {}),
    "conv1d-int8": ("gpt2", "int8", {}),
    "conv1d-int4": ("gpt2", "int4-weight-only", {"block_size": 8}),
    "conv1d-float8": ("gpt2", "float8", {"overrides": {"*.c_fc": "float"}}),
    "experts-int4": ("mixtral", "int4-weight-only", {"block_size": 8, "weight_symmetric": False}),
    "experts-float8": ("qwen3_moe", "float8", {}),
    "experts-float": ("mixtral", "int8", {"overrides": {"*.experts.*": "float"}}),
    "shared-experts": ("qwen2_moe", "float8-dynamic", {}),
    "cache": ("llama", "int8", {"kv": "float8"}),
    "mixed": (
        "llama",
        "int8",
        {"overrides": {"*.down_proj": "int4-weight-only", "*.0.*.q_proj": "float"}},
    ),
    "head": ("gpt_neox", "int8", {"overrides": {"lm_head": "int8-weight-only"}}),
    "bfloat16": ("llama", "int8", {"dtype": torch.bfloat16}),
}


def _in_the_formats_words(linear: QuantizedLinear) -> QuantizedLinear:
    """With the reciprocal of NVFP4's second level rounded as the format stores it."""

    def stored(scale: torch.Tensor | None) -> torch.Tensor | None:
        return None if scale is None else scale.reciprocal().reciprocal()

    if linear.weight_scheme.scale_format != "e4m3":
        return linear
    return replace(
        linear,
        weight_second_scale=stored(linear.weight_second_scale),
        input_scale=stored(linear.input_scale),
    )


def _plain(value: torch.Tensor | None, part: str) -> torch.Tensor | None:
    """Zero points without the sign of zero, which an integer has not."""
    return value + 0.0 if value is not None and part.endswith("zero_point") else value


@pytest.mark.parametrize("case", _MODELS)
def test_comes_back_to_the_last_bit(case: str) -> None:
    family, scheme, controls = _MODELS[case]
    model = artifact(family, scheme, **controls)
    layout, tensors = CompressedTensorsLayout(), tensors_of(model)
    described = {name: linear.description() for name, linear in model.linears.items()}
    linears = layout.linears(tensors, described, model.config)
    assert linears.keys() == model.linears.keys()
    for name, linear in model.linears.items():
        found, expected = linears[name], _in_the_formats_words(linear)
        assert found.description() == expected.description()
        for part in LINEAR_PARTS:
            assert equal(
                _plain(getattr(found, part), part), _plain(getattr(expected, part), part)
            ), (name, part)
        assert torch.equal(found.values(), expected.values())
    floats = layout.floats(tensors, described, model.config)
    assert floats.keys() == model.floats.keys()
    assert all(equal(floats[key], tensor) for key, tensor in model.floats.items())
    if model.cache is not None:
        entry = {
            "scheme": tensor_scheme_to_dict(model.cache.scheme),
            "layers": list(model.cache.key_scale),
        }
        cache = layout.cache(tensors, entry, model.config)
        assert cache.scheme == model.cache.scheme
        assert cache.key_scale == model.cache.key_scale
        assert cache.value_scale == model.cache.value_scale


def test_the_last_bit_of_a_second_level_may_change_and_no_more() -> None:
    model = artifact("wide", "nvfp4")
    for linear in model.linears.values():
        assert linear.weight_second_scale is not None
        stored = _in_the_formats_words(linear).weight_second_scale
        assert stored is not None
        assert (
            abs(int(stored.view(torch.int32)) - int(linear.weight_second_scale.view(torch.int32)))
            <= 1
        )


def test_keys_are_those_that_readers_know() -> None:
    model = artifact("mixtral", "int4-weight-only", block_size=8, kv="float8")
    layer = sorted(
        key.removeprefix("model.layers.1.") for key in tensors_of(model) if ".layers.1." in key
    )
    packed = ("weight_packed", "weight_scale", "weight_shape")
    projections = [f"self_attn.{part}_proj" for part in "qkvo"]
    experts = [
        f"block_sparse_moe.experts.{expert}.{part}"
        for expert in range(4)
        for part in ("w1", "w2", "w3")
    ]
    assert layer == sorted(
        [f"{module}.{part}" for module in projections + experts for part in packed]
        + ["self_attn.k_scale", "self_attn.v_scale", "block_sparse_moe.gate.weight"]
        + ["input_layernorm.weight", "post_attention_layernorm.weight"]
    )


def test_gpt2_lies_as_vllm_turns_it() -> None:
    """Its loader transposes what ends in ``.weight``, and leaves packed weights as they are."""
    width, inner = 48, 192
    name = "transformer.h.0.mlp.c_fc"
    plain = tensors_of(artifact("gpt2", "int8"))
    assert plain[f"{name}.weight"].shape == (width, inner)
    assert plain[f"{name}.weight_scale"].shape == (inner, 1)
    packed = tensors_of(artifact("gpt2", "int4-weight-only", block_size=8))
    assert packed[f"{name}.weight_packed"].shape == (inner, width // 8)
    assert packed[f"{name}.weight_scale"].shape == (inner, width // 8)


@pytest.mark.runtimes
def test_groups_name_what_the_class_does_not(tmp_path: Path) -> None:
    overrides = {"*.down_proj": "int4-weight-only", "*.0.*.q_proj": "float", "lm_head": "int8"}
    config = quantization_config(
        written(artifact("llama", "int8", overrides=overrides), tmp_path / "bundle")
    )
    groups = {
        tuple(group["targets"]): group["format"] for group in config["config_groups"].values()
    }
    assert groups == {
        ("Linear", "lm_head"): "int-quantized",
        ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"): "pack-quantized",
    }
    assert config["ignore"] == ["model.layers.0.self_attn.q_proj"]
    assert config["format"] == "mixed-precision"


@pytest.mark.runtimes
@pytest.mark.parametrize("scheme", ["int8", "nvfp4"])
def test_the_files_are_the_same_for_all_readers(scheme: str, tmp_path: Path) -> None:
    model = artifact("wide", scheme, kv="float8")
    manifests = [
        Manifest.load(written(model, tmp_path / target, target))
        for target in ("vllm", "transformers", "compressed-tensors")
    ]
    first, *others = (dict(manifest.files) for manifest in manifests)
    assert {"config.json", "model.safetensors"} <= first.keys()
    assert others == [first, first]


@pytest.mark.runtimes
def test_float_models_have_no_quantization_config(tmp_path: Path) -> None:
    folder = written(artifact("llama", "float"), tmp_path / "bundle")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # transformers 4


def _refused(model: QuantizedModel, words: str) -> None:
    with pytest.raises(BackendError, match=words) as found:
        tensors_of(model)
    assert found.value.hint


def test_act_order_with_groups_of_its_own_is_refused() -> None:
    model = artifact("llama", "int4-weight-only", block_size=8, weights="gptq:static_groups=false")
    _refused(model, "follow an order of the input features of their own")


def test_gptq_with_static_groups_is_not() -> None:
    assert tensors_of(artifact("llama", "int4-weight-only", block_size=8, weights="gptq"))


def test_short_blocks_are_refused() -> None:
    _refused(
        artifact("llama", "int4-weight-only", block_size=32),
        "blocks of 32 do not divide the 48 input features",
    )


@pytest.mark.parametrize(
    ("family", "linears", "words"),
    [
        ("llama", ["model.embed_tokens"], "embedding"),
        ("mixtral", ["model.layers.0.mlp.experts.down_proj.0"], "all experts"),
    ],
)
def test_models_are_refused_with_a_reason(family: str, linears: list[str], words: str) -> None:
    config = artifact(family, "float").config
    scheme = LINEAR_SCHEMES["int8-weight-only"]
    reason = model_refusal(SafetensorsBackend(), config, dict.fromkeys(linears, scheme), BOTH)
    assert reason is not None
    assert words in reason.reason
    whole = dict.fromkeys(Names.of(config).specs, scheme)
    assert model_refusal(SafetensorsBackend(), config, whole, BOTH) is None
