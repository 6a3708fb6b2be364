"""Output folders appear complete or not at all, whatever goes wrong."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from calib.errors import OutputError
from exporter.output import LIST_FILE, atomic_folder, check_target, sha256_tree, why_not_written


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def old_result(target: Path) -> None:
    with atomic_folder(target) as folder:
        (folder / "report.json").write_text("old")


def write_and_raise(target: Path, error: BaseException) -> None:
    with atomic_folder(target) as folder:
        (folder / "half").write_text("w")
        raise error


def test_others_may_read_what_a_library_wrote_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "inner").mkdir()
            for path in (folder / "private", folder / "inner" / "private"):
                path.write_text("w")
                path.chmod(0o600)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("private")}
    assert modes == {0o640}


def test_a_finished_folder_appears_under_its_name_and_nothing_else_does(tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "out"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("w")
        assert not target.exists()
        assert folder.parent.parent == target.parent  # so that a rename suffices
    assert names(target) == [LIST_FILE, "weights"]
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), SystemExit(1)], ids=repr)
def test_any_exception_leaves_nothing_behind_not_even_parents(
    tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        write_and_raise(tmp_path / "a" / "b" / "out", error)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
        OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
        RuntimeError("SafetensorError: I/O error: File too large (os error 27)"),
    ],
    ids=["system call", "native writer", "limit on files", "limit in a native writer"],
)
def test_a_full_disk_is_one_known_failure(tmp_path: Path, error: Exception) -> None:
    reason = "ulimit -f" if "too large" in str(error) else "disk is full"
    with pytest.raises(OutputError, match=reason) as caught:
        write_and_raise(tmp_path / "out", error)
    assert caught.value.__cause__ is error
    assert names(tmp_path) == []


def test_a_full_disk_is_found_behind_another_exception() -> None:
    outer = RuntimeError("saving failed")
    outer.__cause__ = OSError(errno.EDQUOT, "quota")
    assert why_not_written(outer) == "the disk is full"
    assert why_not_written(RuntimeError("saving failed")) is None


def test_an_existing_folder_is_refused_before_the_job(tmp_path: Path) -> None:
    old_result(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already") as caught:
        check_target(tmp_path / "out")
    assert "--overwrite" in str(caught.value.hint)
    with pytest.raises(OutputError), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "report.json").read_text() == "old"


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    old_result(tmp_path / "out")
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "rotq.yaml").write_text("new")
        assert (tmp_path / "out" / "report.json").read_text() == "old"
    assert names(tmp_path / "out") == ["rotq.yaml", LIST_FILE]
    assert names(tmp_path) == ["out"]


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path: Path) -> None:
    old_result(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", overwrite=True):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "report.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("failing", [1, 2], ids=["moving the old away", "moving the new in"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EBUSY])
def test_a_failing_swap_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, code: int
) -> None:
    old_result(tmp_path / "out")
    calls: list[str] = []
    replace: Callable[..., None] = os.replace

    def failing_replace(source: Path, target: Path) -> None:
        calls.append(str(target))
        if len(calls) == failing:
            raise OSError(code, os.strerror(code))
        replace(source, target)

    monkeypatch.setattr("exporter.output.swap._exchange", lambda one, other: False)
    monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises(OutputError), atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "report.json").write_text("new")
    assert (tmp_path / "out" / "report.json").read_text() == "old"
    (kept,) = tmp_path.glob("out.*.new")
    assert (kept / "report.json").read_text() == "new"
    assert names(tmp_path) == ["out", kept.name]


def test_a_target_that_appears_during_the_job_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="it exists by now") as caught,
        atomic_folder(tmp_path / "out"),
    ):
        (tmp_path / "out").mkdir()
    (kept,) = tmp_path.glob("out.*.new")
    assert str(kept) in caught.value.message
    assert names(tmp_path) == ["out", kept.name]


def test_files_and_dead_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="is a file"):
        check_target(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match="is not a folder"):
        check_target(tmp_path / "file" / "below")
    with pytest.raises(OutputError, match="link to nothing"):
        check_target(tmp_path / "link")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    old_result(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "report.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "report.json").read_text() == "new"


def test_a_parent_without_write_permission_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Patched rather than chmod-ed: the superuser, who runs tests in containers, may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="no permission"):
        check_target(tmp_path / "out")


def test_a_write_that_is_denied_later_is_a_known_failure(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="cannot write"),
        atomic_folder(tmp_path / "out") as folder,
    ):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "weights"))


def test_an_unreadable_input_is_not_taken_for_an_unwritable_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "calibration.txt"))


def test_checksums_cover_every_file_but_the_excluded(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"b")
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "report.json").write_bytes(b"r")
    assert sha256_tree(tmp_path, exclude=["report.json"]) == {
        "a": hashlib.sha256(b"a").hexdigest(),
        "sub/b": hashlib.sha256(b"b").hexdigest(),
    }
