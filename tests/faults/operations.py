"""File operations of a process: counted, and a fault at the one that is asked for."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.chmod": 1,
    "os.truncate": 1,
    "shutil.rmtree": 1,
    "shutil.copyfile": 2,
}
"""Audit events, and how many of their arguments are paths."""
_TAKES_SPACE = ("open", "os.mkdir", "os.rename", "fsync")
_EXCHANGE = "renameat2"
"""Asked for by name before every exchange of two folders, which has no audit event of its own."""


class Fault(Enum):
    """What happens at an operation."""

    KILLED_BEFORE = "killed before"
    KILLED_WITHIN = "killed within"
    """Of a file that is opened for writing: it is there, and holds a few wrong bytes."""
    DISK_FULL = "disk full"


@dataclass
class Operations:
    """Counts the operations of this process below a folder; for a child that has just been forked.

    Args:
        folder: operations elsewhere do not count.
        at: number of the operation, from 1, at which ``fault`` happens; 0: none.
        fault: what happens there.
    """

    folder: Path
    at: int = 0
    fault: Fault = Fault.KILLED_BEFORE
    names: list[str] = field(default_factory=list)
    """Those that were begun, in words."""
    _torn: bool = False

    def watch(self) -> None:
        """Begin. An audit hook cannot be removed again: the process ends with it."""
        fsync, system_open, io_open = os.fsync, os.open, io.open

        def watched_fsync(descriptor: Any) -> None:
            self._begin("fsync", "")
            fsync(descriptor)

        os.fsync = watched_fsync
        os.open = self._tearing(system_open)
        builtins.open = io.open = self._tearing(io_open)  # type: ignore[assignment]
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & _WRITES) or any(letter in (mode or "") for letter in "wax+")
            if writes and self._counts(path):
                self._begin("open", path)
        elif event == "ctypes.dlsym" and arguments[1] == _EXCHANGE:
            self._begin("exchange", "")
        elif event in _PATHS:
            paths = arguments[: _PATHS[event]]
            relative = any(isinstance(each, int) and each >= 0 for each in arguments[len(paths) :])
            if event in ("os.chmod", "shutil.copyfile"):
                relative = False
            if relative or any(map(self._counts, paths)):
                self._begin(event, paths[-1])

    def _counts(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.folder)  # noqa: PTH100

    def _begin(self, what: str, path: Any) -> None:
        self.names.append(f"{what} {Path(os.fsdecode(path)).name}")
        if len(self.names) != self.at:
            return
        if self.fault is Fault.KILLED_BEFORE:
            kill_this()
        elif self.fault is Fault.DISK_FULL and what in _TAKES_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))
        self._torn = self.fault is Fault.KILLED_WITHIN and what == "open"

    def _tearing(self, opening: Callable[..., Any]) -> Callable[..., Any]:
        def opened(*arguments: Any, **settings: Any) -> Any:
            file = opening(*arguments, **settings)
            if self._torn:
                os.write(file if isinstance(file, int) else file.fileno(), b'{"torn": ')
                kill_this()
            return file

        return opened


def kill_this() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)
