"""Checkpoints that hold something else than their config says are refused, by the plan and by the
run, before anything is read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from calib.errors import CheckpointError, RotqError, UnsupportedModelError
from calib.network.checkpoint import open_checkpoint
from exporter.planning.plan import plan
from exporter.recipe import Recipe, load_recipe
from exporter.run.options import RunOptions
from exporter.source import open_source
from tests.checkpoints import TINY, write_checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return shutil.copytree(pristine, tmp_path / "model")


def _add(model: Path, *names: str, tensor: torch.Tensor | None = None) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    added = torch.ones(3) if tensor is None else tensor
    save_file(tensors | {name: added.clone() for name in names}, path, metadata={"format": "pt"})


def _edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _recipe(model: Path, **changes: object) -> Recipe:
    return load_recipe(None, {"model": str(model), **changes})


def _refused(model: Path, kind: type[RotqError], match: str) -> RotqError:
    """What plan and run raise, which is the same."""
    with pytest.raises(kind, match=match) as planned:
        plan(_recipe(model), RunOptions(Path("out")))
    with pytest.raises(kind, match=match) as run:
        open_source(_recipe(model))
    assert (planned.value.message, planned.value.hint) == (run.value.message, run.value.hint)
    assert "\n" not in run.value.message
    return run.value


def _accepted(model: Path, **changes: object) -> None:
    recipe = _recipe(model, **changes)
    plan(recipe, RunOptions(Path("out")))
    open_source(recipe)


UNUSED = {
    "biases": [f"model.layers.{i}.self_attn.{part}_proj.bias" for i in (0, 1) for part in "qkv"],
    "factors": [f"model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"],
    "layers": ["model.layers.2.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight"],
    "fake quantizers": ["model.layers.0.mlp.up_proj.fake_quant.learned"],
    "heads": ["score.weight"],
}


@pytest.mark.parametrize("names", UNUSED.values(), ids=UNUSED)
def test_tensors_that_the_config_does_not_call_for(model: Path, names: list[str]) -> None:
    _add(model, *names)
    error = _refused(model, CheckpointError, "does not call for")
    assert f"holds {len(names)} tensor" in error.message
    assert sorted(names)[0] in error.message
    assert error.hint is not None
    assert "--ignore-unused" in error.hint
    assert ("merge first" in error.hint) == ("lora" in names[0])
    _accepted(model, ignore_unused=True)


def test_buffers_of_older_versions_pass(model: Path) -> None:
    _add(model, "model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")
    _accepted(model)


def test_masks_of_gpt2_pass(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=2048, n_embd=32, n_head=4, n_layer=2, n_positions=64
    )
    model = write_checkpoint(tmp_path / "model", config)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    _add(model, "transformer.h.0.attn.bias", "h.1.attn.bias", tensor=mask)
    _accepted(model)


def test_an_adapter_beside_the_model(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    error = _refused(model, CheckpointError, "adapter")
    assert error.hint is not None
    assert error.hint.startswith("merge first")
    _accepted(model, ignore_unused=True)


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    error = _refused(tmp_path, CheckpointError, "adapter")
    assert "--ignore-unused" not in str(error.hint)


def test_a_classifier(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(**TINY, tie_word_embeddings=True, num_labels=2)
    model = write_checkpoint(tmp_path / "model", config)
    transformers.Qwen2ForSequenceClassification(config).save_pretrained(model)
    error = _refused(model, UnsupportedModelError, "no causal LM")
    assert "Qwen2ForSequenceClassification" in error.message


def test_a_bare_decoder_is_a_causal_lm(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    _edit_config(model, architectures=["LlamaModel"])
    _accepted(model)


PACKED = {
    "model.layers.0.mlp.up_proj.qweight": "GPTQ or AWQ",
    "model.layers.0.mlp.up_proj.weight_packed": "compressed-tensors",
    "model.layers.0.mlp.up_proj.weight_scale": "scales",
    "model.layers.0.mlp.up_proj.weight_scale_inv": "scales",
    "model.layers.0.mlp.up_proj.weight.absmax": "bitsandbytes",
    "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4": "bitsandbytes",
    "model.layers.0.mlp.up_proj.SCB": "bitsandbytes",
    "model.layers.0.mlp.up_proj.input_quantizer._amax": "ModelOpt",
}


@pytest.mark.parametrize(("name", "how"), PACKED.items(), ids=PACKED)
def test_keys_of_quantized_checkpoints(model: Path, name: str, how: str) -> None:
    _add(model, name)
    error = _refused(model, CheckpointError, "quantized already")
    assert how in error.message
    assert name in error.message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_of_few_bits_without_a_quantization_config(model: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    _add(model, name, tensor=torch.ones(48, 32).to(dtype))
    assert name in _refused(model, CheckpointError, "quantized already").message


@pytest.mark.parametrize("file", ["quantize_config.json", "hf_quant_config.json"])
def test_side_files_of_quantizers(model: Path, file: str) -> None:
    (model / file).write_text("{}")
    assert file in _refused(model, CheckpointError, "quantized already").message


def test_a_config_that_says_so(model: Path) -> None:
    _edit_config(model, quantization_config={"quant_method": "hqq", "nbits": 4})
    assert "hqq" in _refused(model, UnsupportedModelError, "quantized already").message


def test_a_config_that_says_so_of_float_weights(model: Path) -> None:
    _edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    _refused(model, CheckpointError, "no tensor is quantized")


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    assert "GGUF" in _refused(tmp_path, CheckpointError, "quantized already").message


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
@pytest.mark.parametrize("beside", ["model-q4_k_m.gguf", "adapter_config.json"])
def test_pickles_are_weights_that_have_to_be_converted(model: Path, file: str, beside: str) -> None:
    (model / "model.safetensors").rename(model / file)
    (model / beside).write_text("{}")
    with pytest.raises(CheckpointError, match="pickles only") as caught:
        open_checkpoint(model)
    assert "convert once" in str(caught.value.hint)


@pytest.mark.parametrize("layers", [1_000_000, 0, -1])
def test_layers_that_cannot_be(model: Path, layers: int) -> None:
    _edit_config(model, num_hidden_layers=layers)
    _refused(model, CheckpointError, f"{layers} layers")


@pytest.mark.parametrize("value", [5, True, {"a": 1}, [5]])
def test_architectures_that_are_no_list_of_names(model: Path, value: object) -> None:
    _edit_config(model, architectures=value)
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        plan(_recipe(model), RunOptions(Path("out")))


def test_names_with_line_breaks_stay_on_one_line(tmp_path: Path) -> None:
    error = CheckpointError(f"the tensor 'a\nb{'x' * 10_000}' is missing")
    assert "'a b" in error.message
    assert str(error) == error.message
    assert len(error.message) < 4000
