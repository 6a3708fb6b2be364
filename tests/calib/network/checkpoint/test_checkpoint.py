"""Opening checkpoints, whole and broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from calib.errors import CheckpointError, UnsupportedModelError
from calib.network.checkpoint import Checkpoint, load_config, open_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture
def single(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert (tmp_path / INDEX).is_file()
    return tmp_path


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_come_back_as_saved(model: Any, kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    checkpoint = open_checkpoint(folder)
    state = model.state_dict()
    assert set(checkpoint) == set(state)
    assert len(checkpoint) == len(state)
    for name, tensor in state.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint[name], tensor)
    assert checkpoint.folder == folder
    assert load_config(folder).model_type == "llama"
    assert load_config(str(folder)).hidden_size == 16


def test_module_as_checkpoint(model: Any) -> None:
    checkpoint = Checkpoint.from_module(model)
    assert torch.equal(checkpoint["lm_head.weight"], model.lm_head.weight)
    assert not checkpoint["lm_head.weight"].requires_grad
    assert checkpoint.shape("lm_head.weight") == (32, 16)
    assert checkpoint.folder is None
    assert "nothing" not in checkpoint


@pytest.mark.parametrize("reader", [load_config, open_checkpoint])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "there is no model folder"),
        (lambda folder: str(folder / "missing"), "there is no model folder"),
        (lambda folder: "./missing", "there is no model folder"),
        (lambda folder: _made(folder / "empty"), "is empty"),
        (lambda folder: _written(folder / "file.safetensors"), "is a file, not a model folder"),
        (
            lambda folder: _written(folder / "bare" / "model.safetensors").parent,
            "has no config.json",
        ),
    ],
    ids=["missing", "missing-text", "relative", "empty", "file", "no-config"],
)
def test_wrong_paths(
    tmp_path: Path, reader: Any, make: Callable[[Path], Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        reader(make(tmp_path))
    assert caught.value.hint


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _written(file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    return file


@pytest.mark.parametrize("reader", [load_config, open_checkpoint])
def test_hub_that_cannot_be_reached(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="someone/no-such-model") as caught:
        reader("someone/no-such-model")
    assert "hf auth login" in str(caught.value.hint)


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard.name} is missing"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("kept", [0, 4, 100, 2000])
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_truncated_file_is_named(kind: str, kept: int, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{file.name} in .* is damaged or truncated"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX} in .* is damaged"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}], ids=["none", "null"])
def test_index_without_what_transformers_asks_for(sharded: Path, metadata: dict[str, Any]) -> None:
    """It would fail when the original is loaded, after the long job."""
    index = json.loads((sharded / INDEX).read_text())
    del index["metadata"]
    (sharded / INDEX).write_text(json.dumps(index | metadata))
    with pytest.raises(CheckpointError, match="has no 'metadata'") as caught:
        open_checkpoint(sharded)
    assert '"metadata": {}' in str(caught.value.hint)


def test_index_that_promises_too_much(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["extra.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tensor extra\.weight is not in"):
        open_checkpoint(sharded)


def test_index_cannot_reach_outside_the_folder(sharded: Path, tmp_path: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../elsewhere.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"shard \.\./elsewhere\.safetensors"):
        open_checkpoint(sharded)


def test_pickles_are_refused_and_never_read(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match="pickles only") as caught:
        open_checkpoint(single)
    assert "save_pretrained" in str(caught.value.hint)
    assert not Path("pwned").exists()


def test_folder_without_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(single)


def test_damaged_config(single: Path) -> None:
    (single / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config of .* cannot be read"):
        load_config(single)


def test_model_type_that_transformers_does_not_know(single: Path) -> None:
    (single / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UnsupportedModelError, match="no_such_model") as caught:
        load_config(single)
    assert "transformers" in str(caught.value.hint)


def test_model_that_needs_code_of_its_own(single: Path) -> None:
    config = {"model_type": "homemade", "auto_map": {"AutoConfig": "configuration.Config"}}
    (single / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="code of its own"):
        load_config(single)
