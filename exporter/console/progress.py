"""One bar per stage on a terminal; elsewhere one plain line per finished stage, so that logs stay
readable.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from exporter.console.streams import speaks_unicode
from exporter.reporting.summary import human_seconds

_ASCII_BAR = 30


class _AsciiBar(ProgressColumn):
    """rich's own bar consists of box-drawing characters."""

    def render(self, task: Task) -> Text:
        full = int(_ASCII_BAR * task.completed / task.total) if task.total else 0
        return Text(f"[{'#' * full}{'.' * (_ASCII_BAR - full)}]")


class ConsoleProgress:
    """A :class:`calib.progress.Progress` that draws. Use as a context manager: leaving it takes the
    bars down.

    A stage is finished when ``done`` reaches ``total``; one whose total is unknown when the next
    stage begins, or at the end. A stage that reports 0 again starts over.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = _bars(console) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        """Start of each unfinished stage; the open-ended ones among them wait for the next stage.
        """
        self._open_ended: set[str] = set()

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish_open_ended()
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Report that ``done`` of ``total`` units of ``stage`` are finished."""
        if stage not in self._started:
            self._finish_open_ended()
            self._start(stage, total)
        if self._bars is not None:
            self._bars.update(self._tasks[stage], completed=done, total=total)
        if total is not None and done >= total:
            self._finish(stage)

    def _start(self, stage: str, total: int | None) -> None:
        self._started[stage] = time.monotonic()
        if total is None:
            self._open_ended.add(stage)
        if self._bars is None:
            return
        if stage in self._tasks:
            self._bars.reset(self._tasks[stage], total=total)
        else:
            self._tasks[stage] = self._bars.add_task(stage, total=total)

    def _finish_open_ended(self) -> None:
        for stage in sorted(self._open_ended):
            self._finish(stage)

    def _finish(self, stage: str) -> None:
        seconds = time.monotonic() - self._started.pop(stage)
        self._open_ended.discard(stage)
        if self._bars is None:
            self._console.print(f"{stage}: {human_seconds(seconds)}", soft_wrap=True)
            return
        task = self._tasks[stage]
        completed = self._bars.tasks[self._bars.task_ids.index(task)].completed
        # A known end stops the spinner and fills the bar of a stage that never knew its total.
        self._bars.update(task, total=max(completed, 1), completed=max(completed, 1))
        self._bars.stop_task(task)


def _bars(console: Console) -> Progress:
    unicode = speaks_unicode(console)
    return Progress(
        SpinnerColumn("dots" if unicode else "line", finished_text=" "),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_ASCII_BAR) if unicode else _AsciiBar(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        # What libraries print to stdout while a bar is up is not ours to move: the command line
        # deals with it.
        redirect_stdout=False,
    )
