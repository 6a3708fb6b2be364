"""What is renamed is on the disk before it, and the new name before the old folder goes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import exporter.output.claim as claim_module
from backends.user_cache import read_entry, write_entry
from exporter.output import atomic_folder, replace_text


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is put on the disk, and what is moved and removed, by name and in order."""
    found: list[str] = []

    def noted(what: str, function: Callable[..., object]) -> Callable[..., object]:
        def noting(first: Path, *rest: object) -> object:
            found.append(f"{what} {first.name}")
            return function(first, *rest)

        return noting

    fsync = os.fsync

    def noting_fsync(descriptor: int) -> None:
        found.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(claim_module, "swap", noted("swap", claim_module.swap))
    monkeypatch.setattr(claim_module, "_discard", noted("discard", claim_module._discard))
    monkeypatch.setattr(Path, "replace", noted("replace", Path.replace))
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a descriptor is of")


@linux
def test_a_folder_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, happened: list[str]
) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "old").write_text("old")
    del happened[:]
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text("weights")
    before = happened[: happened.index("swap new")]
    assert {"fsync weights", "fsync inner", "fsync rotq_files.json", "fsync new"} <= set(before)
    after = happened[happened.index("swap new") + 1 :]
    assert after == [f"fsync {tmp_path.name}", "discard new"]


@linux
def test_a_file_is_on_the_disk_before_and_its_name_after_it_takes_its_place(
    tmp_path: Path, happened: list[str]
) -> None:
    replace_text(tmp_path / "report.json", "{}")
    partial = f".report.json.{os.getpid()}.partial"
    assert happened == [f"fsync {partial}", f"replace {partial}", f"fsync {tmp_path.name}"]


def test_what_killed_processes_left_beside_a_file_goes_and_that_of_running_ones_stays(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".report.json.{ended.pid}.partial"
    running = tmp_path / f".report.json.{os.getppid()}.partial"
    another = tmp_path / f".other.json.{ended.pid}.partial"
    for path in (left, running, another):
        path.write_text("{")
    replace_text(tmp_path / "report.json", "{}")
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"report.json", running.name, another.name}


def test_what_killed_processes_left_in_the_cache_goes(tmp_path: Path) -> None:
    left, fresh = tmp_path / "tmpabc.partial", tmp_path / "tmpdef.partial"
    for path in (left, fresh):
        path.write_text("half")
    os.utime(left, (time.time() - 7200,) * 2)
    write_entry(tmp_path / "key.trace", b"data", "the trace", kept=4)
    assert read_entry(tmp_path / "key.trace", "the trace") == b"data"
    assert not left.exists()
    assert fresh.exists()  # another process may be at it
