"""Options left out and names that are nearly right: what the command line makes of them, in one
process.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from exporter.cli import main
from exporter.cli.app import app
from exporter.cli.resolve import resolve
from exporter.flags import RECIPE_KEYS
from exporter.recipe import Recipe, load_recipe
from exporter.run.destination import default_output

pytestmark = pytest.mark.usefixtures("clean_logging")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "int4weight-only"], "did you mean 'int4-weight-only'?"),
        (["--weight-algorithm", "gtpq"], "did you mean 'gptq'?"),
        (["--smoothing", "smothquant"], "did you mean 'smoothquant'?"),
        (["--backend", "safetensor"], "did you mean 'safetensors'?"),
        (["--target", "transformer"], "did you mean 'transformers'?"),
        (["--block-size", "32", "--scheme", "nvfp4"], "--block-size: the format of 'nvfp4'"),
        (["--override", "auto"], "--overrides takes auto or none"),
        (["--overrides", "*.down_proj=float"], "Did you mean --override PATTERN=SCHEME?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_near_miss_is_wrong_usage_and_answered_with_what_was_meant(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["export", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "source", "backend", "target"),
    [
        ({"target": "vllm"}, None, "safetensors", "vllm"),
        ({"target": "trt-llm"}, None, "safetensors", "modelopt"),
        ({"target": "genai"}, None, "onnx", "ort"),
        ({"target": ["onnxruntime", "openvino"]}, None, "onnx", ["ort", "openvino"]),
        ({"target": ["onnxruntime", "ort"]}, None, "onnx", "ort"),
        ({"target": "tensorrt"}, None, "onnx", "tensorrt"),
        ({"target": "tensorrt", "backend": "safetensors"}, None, "safetensors", "tensorrt"),
        ({"target": "tensorrt"}, "bundle.yaml", "safetensors", "tensorrt"),
        ({"target": "nowhere"}, None, "onnx", "nowhere"),
        ({}, "bundle.yaml", "safetensors", None),
    ],
)
def test_a_target_names_its_backend(
    flags: dict[str, Any], source: str | None, backend: str, target: object, tmp_path: Path
) -> None:
    (tmp_path / "bundle.yaml").write_text("backend: safetensors")
    recipe = resolve(source, flags)
    assert (recipe.backend, recipe.target) == (backend, target)


@pytest.mark.parametrize(
    ("values", "goal", "name"),
    [
        ({"backend": "onnx"}, "export", "embedded-int8-ort"),
        ({"model": "org/name", "target": ["ort", "openvino"]}, "export", "name-int8-ort-openvino"),
        ({"model": ".", "scheme": "w4a4"}, "calibrate", "here-w4a4"),
        ({"model": "org/name"}, "capture", "name-capture"),
    ],
)
def test_a_folder_that_nobody_names_says_what_is_in_it(
    values: dict[str, Any],
    goal: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert default_output(load_recipe(None, values), goal) == Path("out") / name


def test_the_command_of_the_seed_is_complete(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["export", "--backend", "onnx", "--dry-run"]) == 0
    assert "output: out/embedded-int8-ort\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


EXAMPLES = [
    line.strip()
    for command in app.registered_commands
    if command.name not in ("report", "sweep")  # tested by themselves
    for line in str(command.epilog).splitlines()
    if " -o " in line
]


def test_examples_hold_what_is_checked_without_a_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reached = []

    def stop(recipe: Recipe, options: object) -> None:
        """Options are checked now, and nothing is read yet."""
        reached.append(recipe)
        raise typer.Exit

    monkeypatch.setattr("exporter.run.reservation.check_paths", stop)
    assert len(EXAMPLES) > 10
    for count, example in enumerate(EXAMPLES, 1):
        assert main(shlex.split(example)[1:]) == 0, (example, capsys.readouterr().err)
        assert len(reached) == count, example


def test_help_says_the_defaults_that_recipes_have() -> None:
    from typer.main import get_command

    export = get_command(app).commands["export"]  # type: ignore[attr-defined]
    recipe = Recipe().model_dump(mode="json")
    for param in export.params:
        key = RECIPE_KEYS.get(param.name)
        if key is None or param.is_flag:
            continue
        assert "default:" in param.help or param.multiple, param.name
        default: Any = recipe
        for part in key.split("."):
            default = default[part]
        if isinstance(default, int | str) and default != "embedded":
            assert f"default: {default}" in param.help or param.name == "backend", param.name
        assert not (param.metavar or "").startswith("<"), param.name
