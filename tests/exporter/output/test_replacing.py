"""``--overwrite`` replaces what rotq wrote, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from calib.errors import OutputError
from exporter.output import LIST_FILE, atomic_folder, check_target
from exporter.output.listing import remove_listed, unlisted, write_list


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What a run wrote, with a folder inside."""
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "report.json").write_text("{}")
        (folder / "ort").mkdir()
        (folder / "ort" / "model.onnx").write_text("weights")
    return tmp_path / "out"


def refused(target: Path, message: str) -> None:
    """Nothing is asked for that could be lost, neither before the job nor at its end."""
    with pytest.raises(OutputError, match=message):
        check_target(target, overwrite=True)
    with pytest.raises(OutputError, match=message), atomic_folder(target, overwrite=True):
        pytest.fail("the block must not run")


def work_for_hours(target: Path, meanwhile: Callable[[], None]) -> None:
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "model").write_text("hours")
        meanwhile()


@pytest.mark.parametrize("marker", ["rotq.yaml", "report.json", "quantized_model.json"])
def test_a_folder_with_a_file_of_a_telling_name_is_not_of_rotq(tmp_path: Path, marker: str) -> None:
    (tmp_path / "mine" / "src").mkdir(parents=True)
    (tmp_path / "mine" / marker).write_text("notes")
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    refused(tmp_path / "mine", "was not written by rotq")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_an_export_of_a_version_without_lists_is_told_apart_and_kept(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("report.json", "rotq.yaml"):
        (tmp_path / "old" / name).write_text("")
    refused(tmp_path / "old", f"has no {LIST_FILE}, which older versions of rotq did not write")
    assert (tmp_path / "old" / "report.json").is_file()


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty", overwrite=True) as folder:
        (folder / "new").write_text("")
    assert (tmp_path / "empty" / "new").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    "where", [".DS_Store", "ort/Thumbs.db", "Desktop.ini", ".ipynb_checkpoints/a-checkpoint.ipynb"]
)
def test_what_nobody_put_there_on_purpose_is_no_obstacle(out: Path, where: str) -> None:
    (out / where).parent.mkdir(exist_ok=True)
    (out / where).write_text("")
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "report.json").write_text("new")
    assert sorted(path.name for path in out.iterdir()) == ["report.json", LIST_FILE]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("where", ["thesis.tex", "ort/notes.txt", ".git/HEAD", ".cache/x"])
def test_a_file_that_was_added_is_named_and_kept(out: Path, where: str) -> None:
    (out / where).parent.mkdir(exist_ok=True)
    (out / where).write_text("mine")
    refused(out, f"holds what rotq did not write: {where}")
    assert (out / where).read_text() == "mine"


def test_links_and_empty_folders_are_somebodys_too(out: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (out / "link").symlink_to(tmp_path / "data")
    (out / "plans").mkdir()
    (out / "a").write_text("")
    (out / "b").write_text("")
    refused(out, r"a, b, link and 1 more")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"files": 3, "format_version": 1}',
        '{"files": ["../x"], "format_version": 1}',
    ],
)
def test_a_damaged_list_is_none(out: Path, text: str) -> None:
    (out / LIST_FILE).write_text(text)
    refused(out, "is missing or damaged")


def test_a_list_that_was_copied_along_makes_nothing_else_replaceable(
    out: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in (out / LIST_FILE, out / "report.json"):
        (mine / path.name).write_bytes(path.read_bytes())
    (mine / "thesis.tex").write_text("")
    refused(mine, "did not write: thesis.tex")


@pytest.mark.parametrize("target", [".", "..", "../out"])
def test_the_current_folder_is_refused(
    out: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(out)
    if target == "..":
        write_list(out.parent)
    refused(Path(target), "is the current folder, or holds it")


def test_what_comes_in_the_last_moment_is_kept(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "rotq.yaml").write_text("new")
        (out / "ort" / "notes.txt").write_text("mine")
    assert sorted(path.name for path in out.iterdir()) == ["rotq.yaml", LIST_FILE]
    (kept,) = out.parent.glob("out.*.old")
    assert [path.name for path in kept.rglob("*") if path.is_file()] == ["notes.txt"]
    assert str(kept) in caplog.text


@pytest.mark.parametrize(
    ("what", "reason"), [("folder", "rotq did not write"), ("file", "is a file by now")]
)
def test_a_finished_result_is_kept_where_the_target_is_somebody_elses_by_now(
    tmp_path: Path, what: str, reason: str
) -> None:
    out = tmp_path / "out"

    def appear() -> None:
        if what == "folder":
            out.mkdir()
        (out / "thesis.tex" if what == "folder" else out).write_text("years")

    with pytest.raises(OutputError, match=reason) as caught:
        work_for_hours(out, appear)
    (kept,) = tmp_path.glob("out.*.new")
    assert str(kept) in caught.value.message
    assert (kept / "model").read_text() == "hours"
    assert sorted(tmp_path.iterdir()) == [out, kept]
    assert [path.read_text() for path in (out, out / "thesis.tex") if path.is_file()] == ["years"]


def test_a_finished_result_is_kept_where_nothing_can_be_put_beside_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Patched rather than chmod-ed: the superuser, who runs tests in containers, may write anywhere.
    def refuse(path: Path, to: Path, rename: Callable[..., Path] = Path.rename) -> Path:
        if to.parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path), None, str(to))
        return rename(path, to)

    def forbid() -> None:
        monkeypatch.setattr(Path, "replace", refuse)
        monkeypatch.setattr(Path, "rename", refuse)

    with pytest.raises(OutputError, match="Permission denied") as caught:
        work_for_hours(tmp_path / "out", forbid)
    (kept,) = tmp_path.glob(".out.rotq/out.*.new")
    assert str(kept) in caught.value.message
    monkeypatch.undo()
    with atomic_folder(tmp_path / "out"):
        pass  # and the next one does not sweep it away
    assert (kept / "model").read_text() == "hours"


def test_what_is_listed_goes_and_a_file_behind_a_link_stays(out: Path, tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub, whose folders are links."""
    blob = tmp_path / "blob"
    (out / "ort" / "model.onnx").rename(blob)
    (out / "ort" / "model.onnx").symlink_to(blob)
    assert unlisted(out) == []
    assert remove_listed(out)
    assert blob.read_text() == "weights"


def test_a_list_names_every_file_and_itself_is_no_surprise(out: Path) -> None:
    assert json.loads((out / LIST_FILE).read_text())["files"] == ["ort/model.onnx", "report.json"]
    assert unlisted(out) == []
