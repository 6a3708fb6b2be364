"""Progress for machines: one JSON object a line, in a file of its own.

    {"event": "begin", "time": 1764590000.0, "command": "rotq export ..."}
    {"event": "progress", "time": ..., "stage": "capture", "done": 12, "total": 128, "seconds": 3.1}
    {"event": "end", "time": ..., "ok": true, "seconds": 61.2}

``total`` is null where it is not known, and ``seconds`` count from the first report of a stage. A
stage is finished where ``done`` equals ``total``; the first and the last report of each are always
there, of those between at most one in :data:`INTERVAL` seconds.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from calib.errors import OutputError
from calib.process.progress import Progress

INTERVAL = 0.2


class Events:
    """A :class:`calib.process.progress.Progress` that writes, and passes on to another. Use as a
    context manager.

    Args:
        path: gets the lines; one that is there is replaced, a pipe is written to.
        then: is called as well.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, then: Progress) -> None:
        self._then = then
        try:
            self._file: TextIO = path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise OutputError(
                f"cannot write events to '{path}': {error.strerror or error}",
                hint="give another file to --json-events",
            ) from error
        self._began = time.monotonic()
        self._stages: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._write("begin", command=shlex.join(["rotq", *sys.argv[1:]]))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        said = {} if error is None else {"error": str(error) or type(error).__name__}
        taken = round(time.monotonic() - self._began, 3)
        self._write("end", ok=error is None, seconds=taken, **said)
        self._file.close()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Report that ``done`` of ``total`` units of ``stage`` are finished."""
        now = time.monotonic()
        first = stage not in self._stages
        began = self._stages.setdefault(stage, now)
        finished = total is not None and done >= total
        if first or finished or now - self._said.get(stage, 0.0) >= INTERVAL:
            self._said[stage] = now
            seconds = round(now - began, 3)
            self._write("progress", stage=stage, done=done, total=total, seconds=seconds)
        if finished:  # it may begin again
            self._stages.pop(stage)
        self._then(stage, done, total)

    def _write(self, event: str, **values: object) -> None:
        line = {"event": event, "time": round(time.time(), 3), **values}
        try:
            self._file.write(json.dumps(line) + "\n")
        except (OSError, ValueError):  # who reads is gone, or the disk is full: the run goes on
            return
