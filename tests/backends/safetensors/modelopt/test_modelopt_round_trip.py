"""What a bundle holds is what the artifact held: integers, scales and float tensors, to the last
bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backends.base import WriteOptions
from backends.safetensors.backend import SafetensorsBackend
from backends.safetensors.modelopt.layout import ModelOptLayout
from backends.safetensors.modelopt.tensors import linear_from
from backends.safetensors.read import open_bundle, read_model
from calib.artifact import LINEAR_PARTS, QuantizedModel
from calib.errors import BackendError
from tests.backends.safetensors.compressed_tensors.compressed_support import equal
from tests.backends.safetensors.modelopt.modelopt_support import (
    TARGET,
    calibrated,
    files_of,
    tensors_of,
)

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int8": ("llama", "int8", {}),
    "int8-weight-only": ("qwen2", "int8-weight-only", {}),
    "int4": ("llama", "int4-weight-only", {}),
    "int4-gptq": ("llama", "int4-weight-only", {"weights": "gptq"}),
    "w4a8-float8": ("phi3", "w4a8-float8", {}),
    "float8": ("qwen2", "float8", {"kv": "float8"}),
    "float8-dynamic": ("llama", "float8-dynamic", {}),
    "nvfp4": ("llama", "nvfp4", {}),
    "mxfp8": ("llama", "mxfp8", {}),
    "conv1d-int8": ("gpt2", "int8", {"overrides": {"*.c_fc": "float"}}),
    "conv1d-int4": ("gpt2", "int4-weight-only", {}),
    "experts-int4": ("mixtral", "int4-weight-only", {}),
    "experts-w4a8": ("mixtral", "w4a8-float8", {}),
    "experts-nvfp4": ("qwen2_moe", "nvfp4", {}),
    "experts-float": ("mixtral", "int8", {"overrides": {"*.experts.*": "float"}}),
    "cache-beside-float-keys": (
        "llama",
        "int8",
        {"kv": "float8", "overrides": {"*.k_proj": "float"}},
    ),
    "mixed": (
        "llama",
        "int8",
        {"overrides": {"*.down_proj": "int4-weight-only", "*.0.*.q_proj": "float"}},
    ),
    "head": ("llama", "int8", {"overrides": {"lm_head": "int8-weight-only"}}),
    "bfloat16": ("llama", "int8", {"dtype": torch.bfloat16, "kv": "float8"}),
    "float16": ("qwen2", "w4a8-float8", {"dtype": torch.float16}),
    "nvfp4-bfloat16": ("llama", "nvfp4", {"dtype": torch.bfloat16}),
    "float": ("llama", "float", {}),
}


def _read(model: QuantizedModel, folder: Path) -> QuantizedModel:
    SafetensorsBackend().write(model, folder, WriteOptions(TARGET))
    return read_model(open_bundle(folder, target=TARGET, verify=True), ModelOptLayout())


@pytest.mark.parametrize("case", _MODELS)
def test_comes_back_to_the_last_bit(case: str, tmp_path: Path) -> None:
    family, scheme, controls = _MODELS[case]
    model = calibrated(family, scheme, **controls).artifact
    found = _read(model, tmp_path)
    assert found.linears.keys() == model.linears.keys()
    for name, linear in model.linears.items():
        assert found.linears[name].description() == linear.description()
        for part in LINEAR_PARTS:
            assert equal(getattr(found.linears[name], part), getattr(linear, part)), (name, part)
        assert torch.equal(found.linears[name].values(), linear.values())
    assert found.floats.keys() == model.floats.keys()
    assert all(equal(found.floats[key], tensor) for key, tensor in model.floats.items())
    if model.cache is None:
        assert found.cache is None
    else:
        assert found.cache is not None
        assert found.cache.scheme == model.cache.scheme
        for ours, theirs in (
            (found.cache.key_scale, model.cache.key_scale),
            (found.cache.value_scale, model.cache.value_scale),
        ):
            assert ours.keys() == theirs.keys()
            assert all(equal(ours[layer], theirs[layer]) for layer in theirs)


def test_int4_values_of_both_signs_come_back_from_either_half_of_a_byte() -> None:
    model = calibrated("llama", "int4-weight-only", weights="mse").artifact
    name = "model.layers.0.mlp.down_proj"
    linear = model.linears[name]
    stored = {
        key.rpartition(".")[2]: tensor
        for key, tensor in tensors_of(model).items()
        if key.startswith(f"{name}.")
    }
    byte = int(stored["weight"][3, 5])
    low, high = (int(linear.weight[row, 5]) for row in (6, 7))
    assert byte == (low & 15) | (high & 15) << 4
    found = linear_from(name, linear.description(), stored, torch.float32)
    values = set(linear.weight.flatten().tolist())
    assert set(found.weight.flatten().tolist()) == values >= {-7, -1, 0, 1, 7}


def test_the_second_scale_of_w4a8_covers_all_that_readers_merge() -> None:
    """Divided by it, every INT4 scale times its largest integer is within FP8's range; TensorRT-LLM
    asks for one.
    """
    model = calibrated("llama", "w4a8-float8").artifact
    tensors, attention = tensors_of(model), "model.layers.0.self_attn"
    merged = [f"{attention}.{part}_proj" for part in "qkv"]
    seconds = [tensors[f"{module}.weight_scale_2"] for module in merged]
    assert len({float(second) for second in seconds}) == 1
    assert float(tensors[f"{attention}.o_proj.weight_scale_2"]) != float(seconds[0])
    largest = max(float(model.linears[module].values().abs().amax()) for module in merged)
    assert largest / float(seconds[0]) == pytest.approx(448, rel=1e-6)


def test_nothing_quantized_is_a_plain_checkpoint() -> None:
    model = calibrated("llama", "float").artifact
    files = files_of(model)
    assert files.keys() == {"config.json"}
    config = files["config.json"]
    assert "quantization_config" not in config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # transformers 4
    assert tensors_of(model).keys() == model.floats.keys()


def test_a_bundle_without_float_weights_is_damaged() -> None:
    model = calibrated("llama", "int8").artifact
    described = {name: linear.description() for name, linear in model.linears.items()}
    kept = {key: tensor for key, tensor in tensors_of(model).items() if "_proj" in key}
    with pytest.raises(KeyError, match="no float weight"):
        ModelOptLayout().linears(kept, described, model.config)


def test_a_refused_model_leaves_nothing_behind(tmp_path: Path) -> None:
    model = calibrated("llama", "int4-weight-only", block_size=48).artifact
    with pytest.raises(BackendError):
        SafetensorsBackend().write(model, tmp_path, WriteOptions(TARGET))
    assert list(tmp_path.iterdir()) == []


def test_torch_runs_it_from_the_file(tmp_path: Path) -> None:
    model = calibrated("qwen2", "int8", kv="float8").artifact
    SafetensorsBackend().write(model, tmp_path, WriteOptions(TARGET))
    running = SafetensorsBackend().load(tmp_path, TARGET, exact=True)
    assert running.runtime == "torch, from the file"
    ids = torch.arange(3, 9)[None]
    logits, _ = running.forward(ids, torch.ones_like(ids), torch.arange(6)[None])
    assert logits.shape == (1, 6, 97)
    assert bool(logits.isfinite().all())
