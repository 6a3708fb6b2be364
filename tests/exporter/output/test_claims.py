"""A target belongs to one process at a time, and what a killed one leaves does not stay."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from cli_support import ROOT

import exporter.output.lock as lock_module
from calib.errors import OutputError
from exporter.output import LIST_FILE, atomic_folder, claimed, locked
from exporter.output.lock import HOLDER_FILE, LOCK_FILE

_HOLDS = """
import sys, time
from pathlib import Path
from exporter.output import atomic_folder

target, moment = Path(sys.argv[1]), sys.argv[2]


def stop(*_):
    print("ready", flush=True)
    time.sleep(60)


if moment == "between the renames":
    import exporter.output.swap as swapping

    swapping._exchange = lambda one, other: False
    Path.replace = lambda self, to, old=Path.replace: stop() if to == target else old(self, to)
if moment == "after the exchange":
    import exporter.output.claim as claim

    claim._discard = stop
with atomic_folder(target, overwrite=True) as folder:
    (folder / "report.json").write_text("new")
    if moment == "while writing":
        stop()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target: Path, text: str) -> None:
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "report.json").write_text(text)


@contextmanager
def another(target: Path, moment: str = "while writing") -> Iterator[subprocess.Popen[str]]:
    """A process that has come so far with ``target``; killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDS, str(target), moment],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


def test_a_second_process_is_told_who_is_at_work(tmp_path: Path) -> None:
    with another(tmp_path / "out") as process:
        with pytest.raises(OutputError) as caught, claimed(tmp_path / "out"):
            pytest.fail("the block must not run")
        who = f"is in use by process {process.pid} on {socket.gethostname()}, since 20"
        assert who in caught.value.message
        assert "wait for that run" in str(caught.value.hint)
        write(tmp_path / "other", "beside it")  # and sweeps, but not what is held
        assert (tmp_path / ".out.rotq" / "new" / "report.json").is_file()
    write(tmp_path / "out", "mine")  # the lock ended with its process
    assert names(tmp_path) == ["other", "out"]


def test_one_process_cannot_claim_twice_either(tmp_path: Path) -> None:
    with ExitStack() as held:
        held.enter_context(claimed(tmp_path / "out"))
        with pytest.raises(OutputError, match=f"process {os.getpid()}"):
            held.enter_context(claimed(tmp_path / "out"))
    with claimed(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("next_target", ["out", "other"])
def test_what_a_killed_run_left_is_removed_by_the_next_one_beside_it(
    tmp_path: Path, next_target: str
) -> None:
    with another(tmp_path / "new" / "out"):
        pass
    assert names(tmp_path / "new") == [".out.rotq"]
    write(tmp_path / "new" / next_target, "new")
    assert names(tmp_path / "new") == [next_target]


@pytest.mark.parametrize("next_target", ["out", "other"])
def test_a_kill_between_two_renames_is_mended_at_the_next_start(
    tmp_path: Path, next_target: str
) -> None:
    write(tmp_path / "out", "old")
    with another(tmp_path / "out", "between the renames"):
        assert names(tmp_path) == [".out.rotq"]
    with claimed(tmp_path / next_target, overwrite=True):
        assert (tmp_path / "out" / "report.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_without_overwrite_the_mended_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with another(tmp_path / "out", "between the renames"):
        pass
    with pytest.raises(OutputError, match="exists already"), claimed(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "report.json").read_text() == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="one step is renameat2 of Linux")
def test_an_exchange_leaves_the_new_folder_whenever_it_is_killed(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with another(tmp_path / "out", "after the exchange"):
        assert (tmp_path / "out" / "report.json").read_text() == "new"
    with claimed(tmp_path / "other"):
        assert names(tmp_path) == [".other.rotq", "out"]
    assert names(tmp_path / "out") == ["report.json", LIST_FILE]


@pytest.mark.skipif(sys.platform != "linux", reason="one step is renameat2 of Linux")
def test_there_is_a_folder_at_the_target_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")

    def not_twice(self: Path, target: Path) -> None:
        pytest.fail("moved in two steps")

    monkeypatch.setattr(Path, "replace", not_twice)
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "report.json").read_text() == "new"


@pytest.mark.parametrize("code", ["ENOSYS", "EINVAL"])
def test_where_the_file_system_cannot_exchange_two_renames_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    import ctypes

    write(tmp_path / "out", "old")
    monkeypatch.setattr(ctypes, "get_errno", lambda: getattr(errno, code))

    class Library:
        renameat2: Callable[..., int] = staticmethod(lambda *arguments: -1)

    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Library())
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "report.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_hidden_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / ".notes.rotq").mkdir()
    (tmp_path / ".notes.rotq" / "thesis.tex").write_text("years of work")
    write(tmp_path / "out", "new")
    assert names(tmp_path) == [".notes.rotq", "out"]
    write(tmp_path / "notes", "new")  # its own name, and still not its own
    assert names(tmp_path / ".notes.rotq") == ["thesis.tex"]


def test_scratch_beside_the_target_goes_with_its_block(tmp_path: Path) -> None:
    with claimed(tmp_path / "out") as claim, claim.scratch("walk") as folder:
        (folder / "shard").write_text("")
        assert folder.stat().st_dev == tmp_path.stat().st_dev
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *arguments: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*Permission denied"):
        write(tmp_path / "out", "new")


def test_a_lock_leaves_no_trace_and_damaged_words_are_no_trouble(tmp_path: Path) -> None:
    with locked(tmp_path, "the work folder", "wait"):
        (tmp_path / HOLDER_FILE).write_text("{")
        with (
            pytest.raises(OutputError, match="the work folder is in use by another process"),
            locked(tmp_path, "the work folder", "wait"),
        ):
            pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_the_holder_is_named_beside_the_lock(tmp_path: Path) -> None:
    """Windows lets nobody read a file that somebody else holds locked."""
    with locked(tmp_path, "the work folder", "wait"):
        assert (tmp_path / LOCK_FILE).read_bytes() == b""
        assert str(os.getpid()) in (tmp_path / HOLDER_FILE).read_text()


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    code = getattr(errno, request.param)

    def refuse(file: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_where_nothing_can_be_locked_the_work_goes_on_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]
    (record,) = caplog.records
    assert "cannot be locked on this file system" in record.message


@pytest.mark.usefixtures("no_locks")
def test_where_nothing_can_be_locked_what_is_there_stays(tmp_path: Path) -> None:
    """It may be a running process's."""
    (tmp_path / ".out.rotq" / "new").mkdir(parents=True)
    (tmp_path / ".out.rotq" / LOCK_FILE).write_text("")
    (tmp_path / ".out.rotq" / "new" / "model").write_text("half")
    write(tmp_path / "other", "beside it")
    with pytest.raises(OutputError, match="or was killed"):
        write(tmp_path / "out", "new")
    assert (tmp_path / ".out.rotq" / "new" / "model").read_text() == "half"


def test_an_open_file_is_released_before_it_is_removed_where_it_has_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    class Lock:
        def release(self) -> None:
            happened.append("release")

    monkeypatch.setattr(lock_module, "_remove", lambda path: happened.append(path.name))
    monkeypatch.setattr(lock_module.os, "name", "nt")
    lock_module.release(cast("Any", Lock()), tmp_path)
    assert happened == [HOLDER_FILE, "release", LOCK_FILE]
