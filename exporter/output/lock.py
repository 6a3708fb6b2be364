"""A folder that one process works in at a time.

The lock is the kernel's, on a file in the folder: it ends with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from calib.errors import OutputError

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK_FILE = "rotq.lock"
_PATIENCE = 0.3
"""Seconds that a process which is just ending has to let go."""
_ATTEMPTS = 5


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Create ``folder`` and its parents; in the end, those of them that are still empty go."""
    created: list[Path] = []
    try:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            created.append(new)
        yield
    finally:
        for new in reversed(created):
            with contextlib.suppress(OSError):
                new.rmdir()


@contextlib.contextmanager
def locked(folder: Path, what: str, hint: str) -> Iterator[None]:
    """Hold ``folder``, which exists, for this process alone.

    Args:
        folder: gets a file :data:`LOCK_FILE` for as long.
        what: the folder stands for, in the words of the user.
        hint: what to do where somebody else holds it.

    Raises:
        OutputError: another run holds it, which is named.
        OSError: the folder cannot be written.
    """
    lock = take(folder)
    if lock is None:
        raise OutputError(f"{what} is in use by {_holder(folder)}", hint=hint)
    try:
        yield
    finally:
        release(lock, folder)


def take(folder: Path) -> BaseFileLock | None:
    """The lock of ``folder``, which is made if it has gone; ``None`` where another process holds
    it.
    """
    from filelock import FileLock, Timeout  # here, because --help needs none

    lock = FileLock(folder / LOCK_FILE, timeout=_PATIENCE)
    for attempt in range(_ATTEMPTS):
        try:
            lock.acquire()
            break
        except Timeout:
            return None
        except FileNotFoundError:  # whoever tidies up has just removed it
            if attempt + 1 == _ATTEMPTS:
                raise
            folder.mkdir(exist_ok=True)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
        (folder / LOCK_FILE).write_text(json.dumps(holder) + "\n", encoding="utf-8")
    return lock


def release(lock: BaseFileLock, folder: Path) -> None:
    """Let ``folder`` go, without a trace of the lock."""
    with contextlib.suppress(OSError):
        (folder / LOCK_FILE).unlink(missing_ok=True)
    lock.release()


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
