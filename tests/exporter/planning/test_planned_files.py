"""``--dry-run`` names the files, and the bytes of a capture, that the run then writes."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from exporter.commands.export import calibrate, export, run_capture
from exporter.commands.rotate import rotate
from exporter.planning.plan import plan
from exporter.planning.stages import Goal
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


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def check(recipe: Recipe, options: RunOptions, goal: Goal) -> tuple[str, ...]:
    """Every planned name stands for a file, and every file is planned."""
    names, files = plan(recipe, options, goal=goal).files, written(options.output)
    assert len(set(names)) == len(names)
    missing = [name for name in names if not any(fnmatchcase(file, name) for file in files)]
    unplanned = [file for file in files if not any(fnmatchcase(file, name) for name in names)]
    assert (missing, unplanned) == ([], [])
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
    assert not any("*" in name for name in names)  # nothing here is large enough for shards


def test_several_targets_have_a_folder_each(model: str, tmp_path: Path) -> None:
    targets = ["tripy", "compressed-tensors"]
    recipe = few(model, backend="safetensors", target=targets, max_shard_size="20kB")
    options = RunOptions(tmp_path / "out", verify=False)
    export(recipe, options)
    names = check(recipe, options, "export")
    assert RECIPE_FILE in names
    assert {"tripy/tripy.json", "compressed-tensors/model-*-of-*.safetensors"} <= set(names)


def test_shards_of_a_graph_and_the_scales_of_smoothing_are_planned(
    model: str, tmp_path: Path
) -> None:
    recipe = few(model, smoothing="smoothquant:0.5", scheme="int8", max_shard_size="20kB")
    options = RunOptions(tmp_path / "out", verify=False)
    export(recipe, options)
    names = check(recipe, options, "export")
    assert {"model-*-of-*.onnx.data", "smoothing.safetensors"} <= set(names)


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
