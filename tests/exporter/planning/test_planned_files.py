"""``--dry-run`` names the files, and the bytes of a capture, that the run then writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from exporter.commands.export import calibrate, export, run_capture
from exporter.commands.rotate import rotate
from exporter.planning.plan import Goal, plan
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint

FEW: dict[str, Any] = {
    "rotate": "none",
    "scheme": "int8-weight-only",
    "calibration.nsamples": 4,
    "calibration.seqlen": 32,
    "evaluation.nsamples": 1,
    "rotation.r1_tokens": 64,
    "rotation.r2_tokens": 32,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


def few(model: str, **changes: Any) -> Recipe:
    return load_recipe(None, {**FEW, "model": model, **changes})


def in_one_piece(name: str) -> str:
    """What a shard is a part of."""
    return re.sub(r"-\d{5}-of-\d{5}", "", name)


def check(recipe: Recipe, options: RunOptions, goal: Goal) -> set[str]:
    """What is written is what was planned; returns the names of the files."""
    planned = [name.partition(" (")[0] for name in plan(recipe, options, goal=goal).files]
    assert len(set(planned)) == len(planned)
    folder = options.output
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {in_one_piece(name) for name in names} == set(planned)
    return names


@pytest.mark.parametrize(
    ("backend", "target", "scheme"),
    [
        ("onnx", "ort", "int8-weight-only"),
        ("onnx", "openvino", "int8-weight-only"),
        ("onnx", "tensorrt", "int8-weight-only"),
        ("safetensors", "tripy", "int8-weight-only"),
        ("safetensors", "tensorrt", "int8-weight-only"),
        ("safetensors", "modelopt", "float8"),
        ("safetensors", "modelopt", "float"),
        ("safetensors", "compressed-tensors", "int8-weight-only"),
    ],
)
def test_every_target_writes_what_was_planned(
    backend: str, target: str, scheme: str, model: str, tmp_path: Path
) -> None:
    recipe = few(model, backend=backend, target=target, scheme=scheme)
    options = RunOptions(tmp_path / "out", verify=False)
    export(recipe, options)
    names = check(recipe, options, "export")
    assert names == {in_one_piece(name) for name in names}  # nothing is large enough for shards


def test_several_targets_have_a_folder_each(model: str, tmp_path: Path) -> None:
    targets = ["tripy", "compressed-tensors"]
    recipe = few(model, backend="safetensors", target=targets, max_shard_size="20kB")
    options = RunOptions(tmp_path / "out", verify=False)
    export(recipe, options)
    names = check(recipe, options, "export")
    assert RECIPE_FILE in names
    assert "tripy/tripy.json" in names
    assert any(name.startswith("compressed-tensors/model-00001-of-") for name in names)


def test_shards_of_a_graph_and_the_scales_of_smoothing_are_planned(
    model: str, tmp_path: Path
) -> None:
    recipe = few(model, smoothing="smoothquant:0.5", scheme="int8", max_shard_size="20kB")
    options = RunOptions(tmp_path / "out", verify=False)
    export(recipe, options)
    names = check(recipe, options, "export")
    assert "smoothing.safetensors" in names
    assert any(name.startswith("model-00002-of-") for name in names)


def test_an_artifact_and_what_is_made_of_it(model: str, tmp_path: Path) -> None:
    recipe, options = few(model), RunOptions(tmp_path / "artifact")
    calibrate(recipe, options)
    check(recipe, options, "calibrate")
    again = RunOptions(tmp_path / "out", verify=False, from_artifact=tmp_path / "artifact")
    export(recipe, again)
    check(recipe, again, "export")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_capture_is_as_large_as_planned(dtype: str, model: str, tmp_path: Path) -> None:
    recipe, options = few(model, rotate="auto", dtype=dtype), RunOptions(tmp_path / "capture")
    run_capture(recipe, options)
    check(recipe, options, "capture")
    planned = plan(recipe, options, goal="capture").bytes_after
    tensors = sum(path.stat().st_size for path in options.output.glob("*.safetensors"))
    assert 0 <= tensors - planned < 16_384  # headers


def test_a_rotated_folder_holds_what_was_planned(model: str, tmp_path: Path) -> None:
    recipe, options = few(model, rotate="r1", scheme="float"), RunOptions(tmp_path / "rotated")
    rotate(recipe, options)
    check(recipe, options, "rotate")
