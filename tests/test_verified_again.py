"""What was exported, judged and exported again from what it left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from calib.errors import CheckpointError
from exporter.commands.export import calibrate, export
from exporter.commands.verify import verify
from exporter.recipe import RECIPE_FILE, load_recipe
from exporter.reporting.report import Report
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint
from tests.few import few, measured


def test_verify_repeats_the_verdict_from_the_folder_alone(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    before = Report.load(folder)
    after = verify(folder, expect_sha256=before.export_sha256)
    assert after.status == "passed"
    assert after.export_sha256 == before.export_sha256
    assert after.calibration.threads == before.calibration.threads is not None
    assert "verify" in Report.load(folder).seconds
    # The same linears on the same rows: the reference was rebuilt from the graph's own integers and
    # scales.
    assert measured(after, 2, "each linear") == pytest.approx(
        measured(before, 2, "each linear"), rel=1e-6
    )


def test_fewer_rows_change_no_verdict(
    exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    before = (folder / "report.json").read_bytes()
    assert verify(folder, rows=4).parity
    assert "4 evaluation rows prove less than the 16 of the export" in caplog.text
    assert (folder / "report.json").read_bytes() == before


def test_verify_names_the_file_that_was_edited(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    data = folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"changed: model\.onnx\.data"):
        verify(folder)


def test_verify_refuses_another_model(exported: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other")
    with pytest.raises(CheckpointError, match="fingerprint"):
        verify(shutil.copytree(exported, tmp_path / "copy"), model=str(other))


def test_an_artifact_is_exported_again_without_calibration(exported: Path, tmp_path: Path) -> None:
    artifact = exported.parent / "work" / "artifact"
    recipe = load_recipe(exported.parent / "work" / RECIPE_FILE)
    result = export(recipe, RunOptions(tmp_path / "again", from_artifact=artifact, verify=False))
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    assert "calibrate" not in result.report.seconds
    assert result.report.status == "unverified"
    # with R4, trained or not
    assert [row.chosen for row in result.report.gate].index(True) in (2, 3)


def test_an_artifact_whose_original_is_gone_still_exports_and_says_what_it_cannot_check(
    tmp_path: Path,
) -> None:
    model = write_checkpoint(tmp_path / "model")
    calibrate(few(model=str(model), rotate="r1,r2"), RunOptions(tmp_path / "artifact"))
    shutil.rmtree(model)
    recipe = load_recipe(tmp_path / "artifact" / RECIPE_FILE)
    report = export(
        recipe, RunOptions(tmp_path / "out", from_artifact=tmp_path / "artifact")
    ).report
    assert report.status == "passed"
    skipped = [row for row in report.parity if row.measured is None]
    assert {row.rung for row in skipped} == {1, 3}
    assert all("not at hand" in row.note for row in skipped)
