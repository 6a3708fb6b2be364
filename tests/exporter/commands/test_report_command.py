"""``rotq report`` and ``--report``: a page beside an export, or in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from calib.errors import BackendError, CheckpointError
from exporter.cli import main
from exporter.commands.export import export
from exporter.commands.report import report_page, write_report
from exporter.commands.verify import verify
from exporter.recipe import load_recipe
from exporter.reporting.card import PICTURES
from exporter.reporting.charts import style
from exporter.reporting.exported import read_export, update_export
from exporter.reporting.report import PAGE_FILE, REPORT_FILE, Report
from exporter.run.options import RunOptions
from tests.few import few


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with its page. Tests that write must copy it."""
    output = tmp_path_factory.mktemp("pictured") / "out"
    return export(few(rotate="r1,r4"), RunOptions(output, report=True)).output


def test_an_export_keeps_what_its_page_shows(pictured: Path) -> None:
    report = Report.load(pictured)
    evidence = report.evidence
    assert {row.name for row in evidence.noise} <= report.stored.keys()
    assert {"self_attn.q_proj", "mlp.down_proj"} <= {row.kind for row in evidence.inputs}
    (curve,) = report.training
    assert curve.rotation == "R1"
    assert len(curve.losses) == 3  # before each of two steps, and of the result
    parted = next(row for row in report.parity if row.metric == "tokens until they part")
    assert parted.measured is not None
    lengths = [each.together for each in evidence.continuations]
    assert parted.measured == pytest.approx(sum(lengths) / len(lengths))
    for each in evidence.continuations:
        assert each.original is not None
        assert (each.original == each.exported) or each.together < 32


def test_page_and_pictures_are_part_of_the_export(pictured: Path) -> None:
    checksums = Report.load(pictured).checksums
    assert {PAGE_FILE, *PICTURES} <= checksums.keys()
    card = (pictured / "README.md").read_text(encoding="utf-8")
    for name in PICTURES:
        assert f"]({name})" in card
        assert (pictured / name).read_bytes().startswith(b"\x89PNG")
    page = (pictured / PAGE_FILE).read_text(encoding="utf-8")
    assert str(pictured) in page  # where it is, and not where it was written


def test_a_later_check_leaves_page_and_digest_as_they_are(pictured: Path, tmp_path: Path) -> None:
    """The digest, which vouches for the page, is given out at export."""
    folder = shutil.copytree(pictured, tmp_path / "out")
    before = Report.load(folder)
    page = (folder / PAGE_FILE).read_bytes()
    after = verify(folder)
    assert after.status == before.status
    assert (folder / PAGE_FILE).read_bytes() == page
    assert Report.load(folder).export_sha256 == before.export_sha256
    report_page(folder)  # refuses a folder that is not what its report says


def test_a_check_that_ends_otherwise_says_that_the_page_does_not(
    pictured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(pictured, tmp_path / "out")
    report, recipe = read_export(folder)
    update_export(folder, report, recipe)
    assert not caplog.records
    update_export(folder, report.model_copy(update={"status": "failed"}), recipe)
    assert [PAGE_FILE in record.getMessage() for record in caplog.records] == [True]
    assert Report.load(folder).export_sha256 == report.export_sha256


def test_an_edited_page_is_refused_as_any_file(pictured: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictured, tmp_path / "out")
    (folder / PAGE_FILE).write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match=PAGE_FILE):
        report_page(folder)


def test_the_command_writes_beside_the_folder(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_logging: None
) -> None:
    folder = shutil.copytree(exported, tmp_path / "demo")
    listed = sorted(path.name for path in folder.iterdir())
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "demo.html")
    assert (tmp_path / "demo.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in folder.iterdir()) == listed

    assert main(["report", str(folder), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert sum(document["stored_bytes"].values()) == document["layers"]["bytes_after"]
    assert document["recipe"]["scheme"] == document["scheme"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("{folder}/page.html", "inside the export"),
        ("page.pdf", "does not end in .html"),
        ("nowhere/page.html", "does not exist"),
        (".", "is a folder"),
    ],
)
def test_a_place_where_no_page_can_be_is_refused(
    exported: Path,
    tmp_path: Path,
    output: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    clean_logging: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(exported), "-o", output.format(folder=exported)]) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_no_export_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_logging: None
) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert REPORT_FILE in capsys.readouterr().err


def test_a_missing_library_is_said_before_the_long_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    recipe = load_recipe(None, {"model": str(tmp_path / "no-such-model")})
    with pytest.raises(BackendError, match="matplotlib"):
        export(recipe, RunOptions(tmp_path / "out", report=True))


def test_a_page_that_cannot_be_written_leaves_the_old_one(exported: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report(exported, page)
    assert page.stat().st_size > 10_000
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_report(exported, tmp_path / "folder.html")
    assert not list((tmp_path / "folder.html").iterdir())
