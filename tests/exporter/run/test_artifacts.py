"""Artifacts opened again: the figures are those of the model that was calibrated, and the recipe is
its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backends.registry import get_backend
from calib.artifact import load_artifact
from calib.errors import CheckpointError, OutputError, QuantizationError, RecipeError, RotqError
from exporter.commands.export import calibrate, export
from exporter.commands.verify import read_back, verify
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe
from exporter.reporting.exported import read_export
from exporter.reporting.report import ParityRow
from exporter.run import rotations
from exporter.run.options import RunOptions
from exporter.run.quantizing import check_names, customised_scheme
from exporter.run.workdir import ARTIFACT, WALK
from exporter.source import open_source, read_rows
from tests.checkpoints import write_checkpoint

FEW = {"calibration.nsamples": 8, "calibration.seqlen": 64, "evaluation.nsamples": 2}
MIXED = {
    "rotate": "r4",
    "scheme": "int8",
    "smoothing": "smoothquant:0.5",
    "weights.algorithm": "gptq",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Widths are multiples of 32, as blocks of weights have it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return str(write_checkpoint(folder, hidden_size=64, intermediate_size=96))


def few(**changes: Any) -> Recipe:
    return load_recipe(
        None, {**FEW, **{key.replace("__", "."): value for key, value in changes.items()}}
    )


def of_rungs(rows: list[ParityRow], *rungs: int) -> dict[str, bool | None]:
    return {row.name: row.passed for row in rows if row.rung in rungs and row.bound is not None}


def test_a_smoothed_artifact_with_a_float_linear_passes_when_it_is_written_and_verified(
    tmp_path: Path,
) -> None:
    made = load_recipe(None, {**FEW, **MIXED, "overrides": {"*.0.mlp.down_proj": "float"}})
    calibrate(made, RunOptions(tmp_path / "artifact"))
    other = few(evaluation__nsamples=3)  # says nothing of smoothing, rotations or overrides
    written = export(other, RunOptions(tmp_path / "out", from_artifact=tmp_path / "artifact"))
    assert all(of_rungs(written.report.parity, 1, 2).values())
    assert of_rungs(verify(tmp_path / "out").parity, 1, 2) == of_rungs(written.report.parity, 1, 2)
    assert load_recipe(tmp_path / "out" / RECIPE_FILE) == made


@pytest.mark.parametrize(
    ("settings", "folded"),
    [
        ({"scheme": "int4-weight-only"}, False),
        ({"scheme": "float", "rotate": "r2"}, False),
        ({"scheme": "int8"}, True),
        ({"scheme": "int8-weight-only", "rotate": "r1"}, True),
        ({"scheme": "int8-weight-only", "overrides": {"*.0.mlp.up_proj": "int8"}}, True),
        ({"scheme": "int8", "rotation.fold_norms": False}, False),
        ({"scheme": "int4-weight-only", "rotation.fold_norms": True}, True),
        ({"scheme": "int4-weight-only", "smoothing": "awq:grid=4"}, False),
    ],
    ids=str,
)
def test_norms_are_folded_where_r1_or_a_quantized_input_wants_it(
    settings: dict[str, Any], folded: bool, tiny: str, tmp_path: Path
) -> None:
    """And the artifact says so, whoever writes it, and ``verify`` fuses the original the same."""
    recipe = load_recipe(None, {**FEW, "model": tiny, "rotate": "none", **settings})
    made = calibrate(recipe, RunOptions(tmp_path / "artifact")).quantized
    assert made.norms_folded is folded
    found = load_artifact(tmp_path / "artifact")
    assert found.norms_folded is folded
    gain = open_source(recipe).checkpoint["model.norm.weight"].float()  # no smoothing reaches it
    expected = torch.ones_like(gain) if folded else gain
    assert torch.equal(found.floats["model.norm.weight"], expected)

    options = RunOptions(tmp_path / "out", from_artifact=tmp_path / "artifact")
    written = export(few(model=tiny), options)
    assert written.report.norms_folded is folded
    assert all(of_rungs(written.report.parity, 1, 2).values())
    assert of_rungs(verify(tmp_path / "out").parity, 1, 2) == of_rungs(written.report.parity, 1, 2)


def test_r1_cannot_leave_norms_as_they_are() -> None:
    recipe = load_recipe(None, {"rotate": "r1,r2", "rotation.fold_norms": False})
    with pytest.raises(RecipeError, match="cannot be false with R1") as caught:
        check_names(recipe)
    assert "fold_norms to auto" in str(caught.value.hint)


def test_another_original_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    calibrate(few(rotate="none", scheme="int8-weight-only"), RunOptions(tmp_path / "artifact"))
    other = few(model=str(write_checkpoint(tmp_path / "model")))
    again = RunOptions(tmp_path / "out", from_artifact=tmp_path / "artifact")
    with pytest.raises(CheckpointError, match="is not the model that") as caught:
        export(other, again)
    assert "--no-verify" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_resume_notices_that_the_model_was_replaced_and_removes_what_was_left_over(
    tmp_path: Path,
) -> None:
    model = write_checkpoint(tmp_path / "model", seed=0)
    recipe = few(model=str(model), rotate="none", scheme="int8-weight-only")
    calibrate(recipe, RunOptions(tmp_path / "out", work_dir=tmp_path / "work"))
    (tmp_path / "work" / WALK).mkdir()
    resumed = RunOptions(tmp_path / "again", work_dir=tmp_path / "work", resume=True)
    calibrate(recipe, resumed)
    assert (tmp_path / "work" / ARTIFACT).is_dir()
    assert not (tmp_path / "work" / WALK).exists()
    write_checkpoint(model, seed=1)
    with pytest.raises(OutputError, match="the weights of the model changed since the run began"):
        calibrate(recipe, RunOptions(tmp_path / "third", work_dir=tmp_path / "work", resume=True))


def test_a_resume_may_not_move_what_is_kept_apart_from_the_calibration_text(
    tmp_path: Path,
) -> None:
    own, other = tmp_path / "own.txt", tmp_path / "other.txt"
    own.write_text("".join(f"{line} she went to the park with her mum.\n" for line in range(400)))
    other.write_text("".join(f"the dog saw {line} birds and ran.\n" for line in range(400)))
    recipe = few(calibration__dataset=str(own), rotate="none", scheme="int8-weight-only")
    calibrate(recipe, RunOptions(tmp_path / "out", work_dir=tmp_path / "work"))

    moved = load_recipe(None, {**recipe.model_dump(), "evaluation.dataset": str(other)})
    before, after = (train_rows(each) for each in (recipe, moved))
    assert before != after  # what was held back before is calibrated on now
    resumed = RunOptions(tmp_path / "again", work_dir=tmp_path / "work", resume=True)
    with pytest.raises(OutputError, match=r"evaluation\.dataset was null and is now"):
        calibrate(moved, resumed)
    assert not (tmp_path / "again").exists()
    calibrate(recipe, resumed)


def train_rows(recipe: Recipe) -> list[list[int]]:
    source = open_source(recipe)
    rows = read_rows(recipe, source.tokenizer, source.config)
    return [row.tolist() for row in rows.train]


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "int4-weight-only", "weights.block_size": 32},
        {"scheme": "int8", "activations.symmetric": False},
        {"scheme": "int8"},
    ],
    ids=str,
)
def test_what_is_read_back_has_the_scheme_that_was_exported(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    written = export(few(rotate="none", **changes), RunOptions(tmp_path / "out", verify=False))
    report, recipe = read_export(tmp_path / "out")
    backend, source = get_backend(report.backend), open_source(recipe)
    _, quantized = read_back(tmp_path / "out", report, recipe, source, backend)
    assert quantized.scheme == customised_scheme(written.recipe)
    for scheme in quantized.schemes().values():
        assert scheme == quantized.scheme.linear


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "int8", "overrides": {"no.such.linear": "float"}}, "matches no linear"),
        ({"scheme": "nvfp4"}, "blocks of 16 do not divide"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_anything_is_captured(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(*_: Any) -> None:
        raise RotqError("captured first")

    monkeypatch.setattr(rotations, "captured", capture)
    model = write_checkpoint(tmp_path / "model", intermediate_size=88)
    with pytest.raises(QuantizationError, match=message):
        calibrate(few(model=str(model), rotate="r1,r2", **changes), RunOptions(tmp_path / "out"))
