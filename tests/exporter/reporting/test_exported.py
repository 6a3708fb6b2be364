"""What an exported folder says of itself: complete, and written whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import sample_report

from calib.errors import CheckpointError
from exporter.output import atomic_folder, replace_text
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.describe import finish
from exporter.reporting.exported import check_unchanged, edited_files, read_export, update_export
from exporter.reporting.report import CARD_FILE, REPORT_FILE, Report
from tests.hub_cache import is_sound, link_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export, as far as it has no weights."""
    with atomic_folder(tmp_path / "out") as made:
        (made / "inner").mkdir()
        (made / "inner" / "model.onnx").write_text("weights")
        (made / RECIPE_FILE).write_text(Recipe().to_yaml())
        finish(sample_report(), Recipe(), made)
    return tmp_path / "out"


def failed(folder: Path) -> Report:
    """What a check finds that the folder does not say yet."""
    found = sample_report("failed")
    return Report.load(folder).model_copy(
        update={"status": found.status, "parity": found.parity, "seconds": found.seconds}
    )


def test_an_export_is_unchanged_also_after_an_update(folder: Path) -> None:
    report, recipe = read_export(folder)
    assert edited_files(folder, report) == {}
    updated = update_export(folder, failed(folder), recipe)
    assert updated == Report.load(folder)
    assert updated.status == "failed"
    assert "PARITY FAILED" in (folder / CARD_FILE).read_text()
    assert edited_files(folder, updated) == {}
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "inner/notes.md"])
def test_added_files_that_nothing_loads_are_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (folder / name).write_text("x")
    check_unchanged(folder, Report.load(folder))
    assert f"holds what was not exported: {name}" in caplog.text
    assert edited_files(folder, Report.load(folder)) == {"added": [name]}


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model", "inner/more.onnx", "model.onnx.data", "Model.PT", "a.py", "merges.txt"],
)
def test_added_files_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text("x")
    assert edited_files(folder, Report.load(folder)) == {"added": [name]}
    with pytest.raises(CheckpointError, match=f"added: {name}"):
        check_unchanged(folder, Report.load(folder))


def test_added_links_are_named_wherever_they_lead(folder: Path, tmp_path: Path) -> None:
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    (folder / "elsewhere").symlink_to(tmp_path)
    assert edited_files(folder, Report.load(folder)) == {"added": ["elsewhere", "gone"]}


def test_what_git_the_hub_and_file_managers_keep_beside_it_is_no_part_of_it(folder: Path) -> None:
    hub = ".cache/huggingface/download/x.metadata"
    for name in (".gitattributes", ".git/HEAD", hub, "inner/Thumbs.db", "desktop.ini"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    check_unchanged(folder, Report.load(folder))


def test_an_empty_list_shows_nothing_and_is_refused(folder: Path) -> None:
    empty = Report.load(folder).model_copy(update={"checksums": {}})
    for reader in (edited_files, check_unchanged):
        with pytest.raises(CheckpointError, match="holds no checksums"):
            reader(folder, empty)


def test_a_file_that_leads_nowhere_is_changed(folder: Path) -> None:
    (folder / "inner" / "model.onnx").unlink()
    (folder / "inner" / "model.onnx").symlink_to(folder / "nowhere")
    assert edited_files(folder, Report.load(folder)) == {"changed": ["inner/model.onnx"]}


def test_an_edited_card_is_kept_and_no_reason_to_refuse(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / CARD_FILE).write_text("my words")
    report, recipe = read_export(folder)
    assert edited_files(folder, report) == {"changed": [CARD_FILE]}
    check_unchanged(folder, report)
    update_export(folder, failed(folder), recipe)
    assert (folder / CARD_FILE).read_text() == "my words"
    assert Report.load(folder).status == "failed"
    assert "was edited and is left as it is" in caplog.text


@pytest.mark.parametrize("at", [1, 2], ids=["before the card", "before the report"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_kill_or_a_full_disk_leaves_what_was_there(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    at: int,
) -> None:
    before, (_, recipe) = Report.load(folder), read_export(folder)
    calls: list[Path] = []

    def stop(path: Path, target: Path, replace: object = Path.replace) -> None:
        calls.append(target)
        if len(calls) == at:
            raise error
        replace(path, target)  # type: ignore[operator]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        if isinstance(error, OSError):
            update_export(folder, failed(folder), recipe)
            assert "No space left on device" in caplog.text
        else:
            with pytest.raises(KeyboardInterrupt):
                update_export(folder, failed(folder), recipe)
    assert Report.load(folder) == before
    check_unchanged(folder, before)
    updated = update_export(folder, failed(folder), recipe)  # and the next check mends it
    assert edited_files(folder, updated) == {}


def test_links_are_replaced_and_never_written_through(folder: Path, tmp_path: Path) -> None:
    link_files(folder, tmp_path / "blobs")
    report, recipe = read_export(folder)
    check_unchanged(folder, report)
    update_export(folder, failed(folder), recipe)
    assert is_sound(tmp_path / "blobs")
    assert Report.load(folder).status == "failed"
    assert not (folder / REPORT_FILE).is_symlink()


def test_another_export_is_not_given_the_findings_of_the_one_before(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, (_, recipe) = failed(folder), read_export(folder)
    with atomic_folder(folder, overwrite=True) as made:
        (made / "model.onnx").write_text("other weights")
        (made / RECIPE_FILE).write_text(Recipe().to_yaml())
        finish(sample_report(), Recipe(), made)
    update_export(folder, found, recipe)
    assert Report.load(folder).status == "passed"
    assert "was written anew meanwhile" in caplog.text


def test_a_folder_that_cannot_be_written_is_read_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, (_, recipe) = Report.load(folder), read_export(folder)
    opened = Path.open

    def refuse(path: Path, mode: str = "r", **settings: object) -> object:
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    assert update_export(folder, failed(folder), recipe).status == "failed"
    assert Report.load(folder) == before
    assert "Permission denied" in caplog.text


def test_a_text_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    replace_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "a", "new \ud800")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
