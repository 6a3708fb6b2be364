"""Bad input gets one clear line and leaves nothing behind. Each case runs the real pipeline until
it is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.onnx import backend as onnx_backend
from calib.errors import (
    BackendError,
    CheckpointError,
    DataError,
    OutputError,
    QuantizationError,
    RecipeError,
    RotqError,
    UnsupportedModelError,
)
from exporter.commands.export import export
from exporter.recipe import load_recipe
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint

FEW = {
    "calibration.nsamples": 4,
    "calibration.seqlen": 32,
    "evaluation.nsamples": 2,
    "rotate": "r1,r2",
    "rotation.r1_tokens": 64,
    "rotation.r2_tokens": 32,
    "rotation.r1.epochs": 1,
    "rotation.r2.epochs": 1,
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return shutil.copytree(pristine, tmp_path / "model")


def _refused(
    model: Path, tmp_path: Path, expected: type[RotqError], match: str, **changes: Any
) -> RotqError:
    """Export, and check what is raised, that it is short and helpful, and that nothing was
    written.
    """
    overrides = {
        **FEW,
        "model": str(model),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    target = tmp_path / "out" / "model"
    with pytest.raises(expected, match=match) as caught:
        export(load_recipe(None, overrides), RunOptions(target))
    assert "\n" not in caught.value.message
    assert not target.parent.exists()
    return caught.value


def _edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensor(model: Path, name: str, edit: Callable[[torch.Tensor], None]) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    edit(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_folder(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", tmp_path, CheckpointError, "nowhere")


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", tmp_path, CheckpointError, "empty")


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("bert", "it is an encoder"), ("no-such-type", "has no model of the type")],
)
def test_a_model_type_that_cannot_be_taken_is_refused_by_what_it_is(
    model_type: str, words: str, model: Path, tmp_path: Path
) -> None:
    _edit_config(model, model_type=model_type)
    _refused(model, tmp_path, UnsupportedModelError, words)


def test_a_missing_shard_is_named(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    names = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    _refused(model, tmp_path, CheckpointError, r"model-00001-of-00002\.safetensors")


def test_a_truncated_file(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    _refused(model, tmp_path, CheckpointError, r"model\.safetensors")


def test_a_tensor_that_is_missing(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    _refused(model, tmp_path, CheckpointError, r"model\.layers\.1\.mlp\.up_proj\.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(model: Path, tmp_path: Path, value: float) -> None:
    _edit_tensor(
        model, "model.layers.1.self_attn.k_proj.weight", lambda tensor: tensor[3, 5].fill_(value)
    )
    _refused(model, tmp_path, CheckpointError, r"model\.layers\.1\.self_attn\.k_proj\.weight")


def test_an_activation_that_is_not_finite_is_named(model: Path, tmp_path: Path) -> None:
    # Finite in float32, but the product of gate and up in the MLP is not.
    for name in ("gate_proj", "up_proj"):
        _edit_tensor(model, f"model.layers.0.mlp.{name}.weight", lambda tensor: tensor.mul_(1e25))
    _refused(model, tmp_path, QuantizationError, r"model\.layers\.", rotate="none")


def test_pickles_are_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    _refused(model, tmp_path, CheckpointError, "pickle")


def test_a_missing_tokenizer(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    _refused(model, tmp_path, CheckpointError, "tokenizer")


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_empty_calibration_text(model: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text)
    _refused(model, tmp_path, DataError, "text", calibration__dataset=str(path))


def test_calibration_text_that_is_too_short(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("once upon a time\n")
    _refused(model, tmp_path, DataError, "too short", calibration__dataset=str(path))


def test_missing_calibration_text(model: Path, tmp_path: Path) -> None:
    _refused(
        model,
        tmp_path,
        DataError,
        r"missing\.txt",
        calibration__dataset=str(tmp_path / "missing.txt"),
    )


def test_a_malformed_json_line_is_numbered(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "once"}\n{"text": \n')
    _refused(model, tmp_path, DataError, "2", calibration__dataset=str(path))


def test_an_output_folder_that_exists(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export(load_recipe(None, {**FEW, "model": str(model)}), RunOptions(target))
    assert [path.name for path in target.iterdir()] == ["precious"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_in_mid_write(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write = onnx_backend.OnnxBackend.write

    def fail(self: Any, quantized: Any, folder: Path, options: Any) -> None:
        write(self, quantized, folder, options)
        raise error

    monkeypatch.setattr(onnx_backend.OnnxBackend, "write", fail)
    target = tmp_path / "out" / "model"
    with pytest.raises((OutputError, KeyboardInterrupt)):
        export(load_recipe(None, {**FEW, "model": str(model)}), RunOptions(target))
    assert not target.parent.exists()


def test_an_unknown_recipe_key(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("calibration:\n  n_samples: 4\n")
    with pytest.raises(RecipeError, match=r"unknown recipe key 'calibration\.n_samples'"):
        load_recipe(path)


def test_a_scheme_that_the_backend_cannot_express(model: Path, tmp_path: Path) -> None:
    error = _refused(model, tmp_path, BackendError, "calibrated scales", scheme="w4a4")
    assert error.hint is not None
    assert "int8" in error.hint


def test_an_unknown_scheme(model: Path, tmp_path: Path) -> None:
    error = _refused(model, tmp_path, QuantizationError, "int9", scheme="int9")
    assert error.hint is not None
    assert "int8-weight-only" in error.hint


def test_a_device_that_is_not_here(model: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    _refused(model, tmp_path, QuantizationError, "cuda:7", device="cuda:7")
