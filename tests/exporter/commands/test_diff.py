"""``rotq diff``: everything in which two exports differ, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exporter.cli import main
from exporter.commands.diff import diff
from exporter.commands.export import export
from exporter.recipe import load_recipe
from exporter.reporting.report import Report
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def written(model: Path, output: Path, **changes: object) -> Path:
    settings = {
        "model": str(model),
        "rotate": "none",
        "prefix": "none",
        "backend": "safetensors",
        "calibration.nsamples": 4,
        "calibration.seqlen": 32,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return export(load_recipe(None, settings), RunOptions(output, verify=False)).output


def test_an_export_does_not_differ_from_itself(exported: Path, tmp_path: Path) -> None:
    found = diff(exported, shutil.copytree(exported, tmp_path / "copy"))
    assert found.same
    differing = (found.facts, found.recipe, found.rotations, found.figures, found.kept)
    assert not any(differing)
    assert not any((found.numbers, found.only_first, found.only_second))
    assert found.same_numbers == len(Report.load(exported).stored)


def test_one_linear_with_other_numbers_is_named(model: Path, tmp_path: Path) -> None:
    one = written(model, tmp_path / "one", scheme="int8")
    name = "model.layers.1.mlp.up_proj"
    other = written(
        model,
        tmp_path / "other",
        scheme="int8",
        overrides={"*.1.mlp.up_proj": "int8-weight-only"},
    )
    found = diff(one, other)
    assert not found.same
    assert found.numbers == (name,)
    stored = Report.load(one).stored
    assert found.same_numbers == len(stored) - 1
    settings = {row.name: (row.first, row.second) for row in found.recipe}
    assert settings["overrides.*.1.mlp.up_proj"] == ("-", "int8-weight-only")
    assert "model.safetensors" in {row.name for row in found.files}


def test_a_linear_left_in_float_is_in_one_alone(model: Path, tmp_path: Path) -> None:
    one = written(model, tmp_path / "one", scheme="int8-weight-only")
    other = written(
        model,
        tmp_path / "other",
        scheme="int8-weight-only",
        overrides={"*.0.mlp.up_proj": "float"},
    )
    found = diff(one, other)
    (kept,) = (row for row in found.kept if row.name == "model.layers.0.mlp.up_proj")
    assert kept.first == "-"
    assert any("model.layers.0.mlp.up_proj" in name for name in found.only_first)


def test_the_command_prints_tables_json_or_a_word(
    exported: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    clean_logging: None,
) -> None:
    other = str(written(model, tmp_path / "other", scheme="int8"))
    assert main(["diff", str(exported), other]) == 0
    table = capsys.readouterr().out
    for words in ("Facts", "Recipe", "backend", "files differ", "in the first alone"):
        assert words in table
    assert main(["diff", str(exported), other, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["same"] is False
    assert {"name": "backend", "first": "onnx", "second": "safetensors"} in document["facts"]
    assert main(["diff", str(exported), str(exported), "-q"]) == 0
    assert capsys.readouterr().out.strip() == "same"
    assert main(["diff", str(exported), str(tmp_path)]) == 1
