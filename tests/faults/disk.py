"""A disk that is full at some operation: one clear line, and the old output is as it was. Three
ways: the system says so at the n-th operation; no file may grow beyond a size; a small file system.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.faults.cases import CASES, Case, Stage, content
from tests.faults.children import Ended, forked, rotq
from tests.faults.findings import Table, evenly
from tests.faults.kills import Trial
from tests.faults.operations import Fault, Operations

_SIZES = tuple(1 << power for power in range(7, 20))
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_REMOUNT = 32
_GOOD, _WRONG, _CANNOT = 0, 1, 77
_DONE = "done all the same"
_REFUSED = "one line"


def full_disks(
    stage: Stage,
    folder: Path,
    table: Table,
    *,
    most: int | None = None,
    cases: Iterable[Case] = CASES,
) -> None:
    """Fill the disk of each of ``cases`` everywhere, or at ``most`` points of each kind."""
    for case in cases:
        trial = Trial(case, stage, folder)
        for what, run in _limits(trial, most):
            ended = trial.struck(run)
            table.add(f"full disk: {case.name}", what, *judged(trial, ended))
        for size in evenly(_SIZES[-8:], most):
            found = _on_small_disk(trial, size)
            if found is None:
                print("a small file system cannot be mounted here", flush=True)
                break
            table.add(f"small file system: {case.name}", f"of {size} bytes", *found)


def judged(trial: Trial, ended: Ended) -> tuple[str, str]:
    """What is wrong after a full disk, in words, and how the run ended."""
    wrong = trial.half()
    if "Traceback" in ended.said or ended.code not in (0, 1):
        wrong = wrong or f"ended with {ended.code}: {ended.said[-300:]}"
    elif ended.code == 1 and len(ended.errors) != 1:
        wrong = wrong or f"says {ended.errors}"
    elif ended.code == 1 and not any(
        why in ended.said for why in ("disk is full", "ulimit", "space")
    ):
        wrong = wrong or f"says nothing of the disk: {ended.errors}"
    wrong = wrong or _aside(trial, ended)
    return wrong or trial.next_run(), _DONE if ended.code == 0 else _REFUSED


def _aside(trial: Trial, ended: Ended) -> str:
    """A result that is complete and cannot be put in its place is kept beside it, and the one line
    says where; what is wrong with one that is there, in words. It is taken away as a user would.
    """
    for path in list(trial.folder.rglob("*.new")):
        if f"It is in '{path}'" not in ended.said:
            return f"left without a word: {path.name}"
        if path.parent == trial.folder and content(path) != trial.new:
            return f"kept, and not complete: {path.name}"
        shutil.rmtree(path)
    return ""


def _limits(
    trial: Trial, most: int | None
) -> Iterator[tuple[str, Callable[[list[object]], Ended]]]:
    names = trial.operations
    for number in evenly(range(1, len(names) + 1), most):
        operations = Operations(trial.folder, number, Fault.DISK_FULL)
        yield (
            f"at {number} ({names[number - 1]})",
            lambda arguments, own=operations: rotq(arguments, own),
        )
    for size in evenly(_SIZES, most):
        yield f"files of {size} bytes", lambda arguments, own=size: rotq(arguments, most_bytes=own)


def _on_small_disk(trial: Trial, size: int) -> tuple[str, str] | None:
    """The same on a file system of ``size`` bytes, which this user mounts for a child alone;
    ``None`` where that cannot be.
    """
    arguments = trial.prepared()  # on the disk that is there, in its own folder
    kept = trial.folder.with_name("kept")

    def run() -> int:
        if not _mounted(trial.folder, size, kept):
            return _CANNOT
        ended = rotq(arguments)
        _mount(trial.folder, 1 << 28, _REMOUNT)
        wrong, outcome = judged(trial, ended)
        sys.stderr.write(wrong or outcome)
        return _WRONG if wrong else _GOOD

    ended = forked(run)
    if ended.code == _CANNOT:
        return None
    if ended.code == _GOOD:
        return "", ended.said
    return ended.said or f"the child ended with {ended.code}", ""


def _mounted(folder: Path, size: int, kept: Path) -> bool:
    """Whether ``folder`` is a file system of its own now, with ``size`` bytes beside what it
    holds.
    """
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if library.unshare(_NEWNS | _NEWUSER) != 0:
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept)
    taken = sum(_blocks(path) for path in kept.rglob("*"))
    if not _mount(folder, taken + size, 0):
        return False
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    return True


def _mount(folder: Path, size: int, flags: int) -> bool:
    library = ctypes.CDLL(None, use_errno=True)
    options = f"size={size}".encode()
    done: int = library.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options)
    return done == 0


def _blocks(path: Path) -> int:
    return -(-path.stat().st_size // 4096) * 4096 + 4096
