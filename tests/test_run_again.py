"""What a run left behind serves the next one, and the same settings give the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from calib.errors import CheckpointError, OutputError
from exporter.commands.export import export, run_capture
from exporter.recipe import load_recipe
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint
from tests.conftest import SMALL
from tests.few import few


def test_a_run_resumes_from_its_work_folder(exported: Path, tmp_path: Path) -> None:
    work = shutil.copytree(exported.parent / "work", tmp_path / "work")
    recipe = load_recipe(None, SMALL)
    result = export(recipe, RunOptions(tmp_path / "out", work_dir=work, resume=True, verify=False))
    assert "capture" not in result.report.seconds
    assert (tmp_path / "out" / "model.onnx.data").read_bytes() == (
        exported / "model.onnx.data"
    ).read_bytes()


def test_a_run_that_ended_after_its_capture_resumes_there(exported: Path, tmp_path: Path) -> None:
    work = shutil.copytree(exported.parent / "work", tmp_path / "work")
    shutil.rmtree(work / "artifact")
    recipe = load_recipe(None, SMALL)
    result = export(recipe, RunOptions(tmp_path / "out", work_dir=work, resume=True, verify=False))
    assert "capture" not in result.report.seconds
    assert "calibrate" in result.report.seconds
    assert (tmp_path / "out" / "model.onnx.data").read_bytes() == (
        exported / "model.onnx.data"
    ).read_bytes()


def test_a_run_that_is_resumed_writes_the_same_bundle(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    recipe = few(model=str(model), backend="safetensors", target="vllm", rotate="r1,r2")
    digests = [
        export(
            recipe,
            RunOptions(tmp_path / name, work_dir=tmp_path / "work", resume=True, verify=False),
        ).report.export_sha256
        for name in ("first", "second")
    ]
    assert digests[0] == digests[1]


def test_a_resume_with_another_setting_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    work = shutil.copytree(exported.parent / "work", tmp_path / "work")
    changed = load_recipe(None, {**SMALL, "calibration.seqlen": 64})
    with pytest.raises(OutputError, match=r"calibration\.seqlen was 512 and is now 64"):
        export(changed, RunOptions(tmp_path / "out", work_dir=work, resume=True))
    with pytest.raises(OutputError, match="holds a run already"):
        export(changed, RunOptions(tmp_path / "out", work_dir=work))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path / "model"))

    def data(name: str, seed: int) -> bytes:
        recipe = few(model=model, rotate="r1,r2,r4", seed=seed)
        export(recipe, RunOptions(tmp_path / name, verify=False))
        return (tmp_path / name / "model.onnx.data").read_bytes()

    first = data("first", 0)
    assert data("second", 0) == first
    assert data("third", 1) != first


def test_a_capture_is_reused(tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path / "model"))
    recipe = few(model=model, rotate="r1,r2")
    run_capture(recipe, RunOptions(tmp_path / "capture"))
    direct = export(recipe, RunOptions(tmp_path / "direct", verify=False))
    reused = export(
        recipe, RunOptions(tmp_path / "reused", from_capture=tmp_path / "capture", verify=False)
    )
    assert "capture" in direct.report.seconds
    assert "capture" not in reused.report.seconds
    assert (tmp_path / "direct/model.onnx.data").read_bytes() == (
        tmp_path / "reused/model.onnx.data"
    ).read_bytes()
    other = recipe.model_copy(update={"model": str(write_checkpoint(tmp_path / "other", seed=1))})
    with pytest.raises(CheckpointError, match="another model"):
        export(other, RunOptions(tmp_path / "out", from_capture=tmp_path / "capture"))
