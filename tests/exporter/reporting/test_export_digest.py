"""One digest says which export a folder is, and a report says whether it is as it was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import sample_report

from calib.errors import CheckpointError
from exporter.cli import main
from exporter.output import atomic_folder
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.describe import finish
from exporter.reporting.exported import check_expected, read_export, update_export
from exporter.reporting.report import CARD_FILE, REPORT_FILE, Report


def write(folder: Path, weights: str = "weights") -> Report:
    """An export, as far as it has no weights."""
    with atomic_folder(folder) as made:
        (made / "model.onnx").write_text(weights)
        (made / RECIPE_FILE).write_text(Recipe().to_yaml())
        return finish(sample_report(), Recipe(), made)


def test_the_digest_is_of_the_files_and_stays_when_a_check_is_repeated(tmp_path: Path) -> None:
    report = write(tmp_path / "out")
    assert len(report.export_sha256) == 64
    failed = report.model_copy(update={"status": "failed", "parity": sample_report().parity})
    updated = update_export(tmp_path / "out", failed, Recipe())
    assert updated.checksums[CARD_FILE] != report.checksums[CARD_FILE]
    assert updated.export_sha256 == report.export_sha256
    check_expected(tmp_path / "out", updated, report.export_sha256.upper())


def test_other_files_have_another_digest(tmp_path: Path) -> None:
    expected, other = write(tmp_path / "a").export_sha256, write(tmp_path / "b", "weight5")
    with pytest.raises(CheckpointError, match="is not the export that was expected") as caught:
        check_expected(tmp_path / "b", other, expected)
    assert expected in caught.value.message
    assert other.export_sha256 in caught.value.message
    renamed = dict(zip(("model.onny", "rotq.yaml"), other.checksums.values(), strict=False))
    assert other.model_copy(update={"checksums": renamed}).export_sha256 != other.export_sha256


def test_what_the_digest_does_not_cover_is_refused(tmp_path: Path) -> None:
    report = write(tmp_path / "out")
    (tmp_path / "out" / "LICENSE").write_text("x")
    with pytest.raises(CheckpointError, match="does not cover: LICENSE"):
        check_expected(tmp_path / "out", report, report.export_sha256)


def _number(text: str) -> str:
    return text.replace('"rows": ', '"rows": 1', 1)


def _fingerprint(text: str) -> str:
    return text.replace('"fingerprint": "', '"fingerprint": "0', 1)


def _checksum(text: str) -> str:
    values = json.loads(text)
    values["checksums"]["model.onnx"] = "0" * 64
    return json.dumps(values)


@pytest.mark.parametrize("edit", [_number, _fingerprint, _checksum])
def test_an_edited_report_is_refused(tmp_path: Path, edit: Callable[[str], str]) -> None:
    write(tmp_path / "out")
    path = tmp_path / "out" / REPORT_FILE
    edited = edit(path.read_text())
    assert edited != path.read_text()
    path.write_text(edited)
    with pytest.raises(CheckpointError, match="it is damaged or was edited"):
        read_export(tmp_path / "out")


def test_a_report_of_before_is_still_read(tmp_path: Path) -> None:
    report = write(tmp_path / "out")
    path = tmp_path / "out" / REPORT_FILE
    values = json.loads(path.read_text())
    del values["sha256"]
    path.write_text(json.dumps(values))
    assert read_export(tmp_path / "out")[0] == report


@pytest.mark.usefixtures("clean_logging")
def test_verify_refuses_another_export_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "out")
    digest = write(tmp_path / "other", "weight5").export_sha256
    assert main(["verify", str(tmp_path / "out"), "-q", "--expect-sha256", digest]) == 1
    assert "is not the export that was expected" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main(["verify", str(tmp_path / "out"), "--expect-sha256", "abc"]) == 2
    assert "'abc' is no SHA-256" in capsys.readouterr().err
