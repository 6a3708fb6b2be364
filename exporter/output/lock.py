"""A folder that one process works in at a time.

The lock is the kernel's, on a file in the folder: it ends with the process, however that ends. Of
other machines it knows what the file system does: NFS and clusters may be mounted without locks, or
with such as hold on one machine alone. Where there are none, the work goes on with a warning.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from calib.errors import OutputError
from calib.files.reading import read_json

if TYPE_CHECKING:
    from filelock import BaseFileLock

logger = logging.getLogger(__name__)

LOCK_FILE = "rotq.lock"
HOLDER_FILE = "rotq.lock.json"
"""Says who holds the lock; a file of its own, as Windows lets nobody else read a locked one."""
_PATIENCE = 0.3
"""Seconds that a process which is just ending has to let go."""
_ATTEMPTS = 5
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


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
    """Hold ``folder``, which exists, for this process alone, if its file system has locks.

    Args:
        folder: gets a :data:`LOCK_FILE` and a :data:`HOLDER_FILE` for as long.
        what: the folder stands for, in the words of the user.
        hint: what to do where somebody else holds it.

    Raises:
        OutputError: another run holds it, which is named.
        OSError: the folder cannot be written.
    """
    lock, lockable = None, True
    try:
        lock = take(folder)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        lockable = False
        logger.warning(
            "%s cannot be locked on this file system: see to it that no other run writes there",
            what,
        )
    if lock is None and lockable:
        raise OutputError(f"{what} is in use by {_holder(folder)}", hint=hint)
    try:
        yield
    finally:
        release(lock, folder)


def take(folder: Path) -> BaseFileLock | None:
    """The lock of ``folder``, which is made if it has gone; ``None`` where another process holds
    it.

    Raises:
        OSError: it cannot be written, or its file system has no locks.
    """
    from filelock import FileLock, Timeout  # here, because --help needs none

    lock = FileLock(folder / LOCK_FILE, timeout=_PATIENCE, fallback_to_soft=False)
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
        (folder / HOLDER_FILE).write_text(json.dumps(holder) + "\n", encoding="utf-8")
    return lock


def held(folder: Path) -> str | None:
    """Who holds ``folder``; ``None`` where nobody does. Nothing is made, and nothing kept."""
    from filelock import FileLock, Timeout

    if not (folder / LOCK_FILE).is_file():
        return None
    lock = FileLock(folder / LOCK_FILE, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return _holder(folder)
    except OSError:  # no locks here, or none of ours to take
        return None
    lock.release()
    return None


def release(lock: BaseFileLock | None, folder: Path) -> None:
    """Let ``folder`` go, without a trace of the lock; ``None`` where it could not be locked."""
    _remove(folder / HOLDER_FILE)
    if lock is not None and os.name == "nt":  # where an open file cannot be removed
        lock.release()
    _remove(folder / LOCK_FILE)
    if lock is not None and os.name != "nt":  # who waits for it sees that its file has gone
        lock.release()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _holder(folder: Path) -> str:
    try:
        found = read_json(folder / HOLDER_FILE)
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
