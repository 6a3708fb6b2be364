"""One bar per stage on a terminal; elsewhere one plain line per finished stage, so that logs stay
readable, and one at least every :data:`QUIET_SECONDS`, so that they move.
"""

from __future__ import annotations

import contextlib
import threading
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
    TimeRemainingColumn,
)
from rich.text import Text

from exporter.console.streams import speaks_unicode
from exporter.reporting.summary import human_seconds

_ASCII_BAR = 20
QUIET_SECONDS = 30.0
"""How long nothing is said where there is no terminal."""
_OTHER_LINES = 4
"""Of a terminal, beside the bars."""


class _AsciiBar(ProgressColumn):
    """rich's own bar consists of box-drawing characters."""

    def render(self, task: Task) -> Text:
        full = int(_ASCII_BAR * task.completed / task.total) if task.total else 0
        return Text(f"[{'#' * full}{'.' * (_ASCII_BAR - full)}]")


class ConsoleProgress:
    """A :class:`calib.process.progress.Progress` that draws. Use as a context manager: leaving it
    takes the bars down.

    A stage is finished when ``done`` reaches ``total``; one whose total is unknown when the next
    stage begins, or at the end. A stage that reports 0 again starts over.

    Args:
        console: where to draw.
        quiet: seconds after which a line is printed where there are no bars, whether anything was
            reported meanwhile or not.
    """

    def __init__(self, console: Console, quiet: float = QUIET_SECONDS) -> None:
        self._console = console
        self._bars = _bars(console) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        """Start of each unfinished stage; the open-ended ones among them wait for the next stage.
        """
        self._open_ended: set[str] = set()
        self._seen: dict[str, tuple[int, int | None]] = {}
        """How far each stage has come, in units; the last one that reported at the end."""
        self._quiet, self._spoke = quiet, threading.Event()
        self._began, self._ended = time.monotonic(), False

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        else:
            threading.Thread(target=self._speak, name="rotq progress", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish_open_ended()
        self._ended = True
        self._spoke.set()
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Report that ``done`` of ``total`` units of ``stage`` are finished."""
        if stage not in self._started:
            self._finish_open_ended()
            self._start(stage, total)
        self._seen.pop(stage, None)
        self._seen[stage] = done, total
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
            self._bars.reset(self._tasks[stage], total=total, visible=True)
        else:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._make_room(self._bars)

    def _finish_open_ended(self) -> None:
        for stage in sorted(self._open_ended):
            self._finish(stage)

    def _finish(self, stage: str) -> None:
        seconds = time.monotonic() - self._started.pop(stage)
        self._open_ended.discard(stage)
        if self._bars is None:
            self._print(f"{stage}: {human_seconds(seconds)}")
            return
        task = self._tasks[stage]
        completed = self._bars.tasks[self._bars.task_ids.index(task)].completed
        # A known end stops the spinner and fills the bar of a stage that never knew its total.
        self._bars.update(task, total=max(completed, 1), completed=max(completed, 1))
        self._bars.stop_task(task)

    def _make_room(self, bars: Progress) -> None:
        """Take down the oldest finished bars where there are more than the terminal has lines: it
        would show those, and not the ones that move.
        """
        shown = [task for task in bars.tasks if task.visible]
        spare = len(shown) - max(1, self._console.height - _OTHER_LINES)
        for task in [task for task in shown if task.finished][: max(0, spare)]:
            bars.update(task.id, visible=False)

    def _print(self, line: str) -> None:
        self._spoke.set()
        self._console.print(line, soft_wrap=True)

    def _speak(self) -> None:
        """Print where the run is, whenever nothing was printed for a while; runs in a thread, as
        what is long may report nothing meanwhile.
        """
        while not self._ended:
            self._spoke.clear()
            if not self._spoke.wait(self._quiet) and not self._ended:
                with contextlib.suppress(OSError, ValueError):  # nobody is left to read it
                    self._console.print(self._where(), soft_wrap=True)

    def _where(self) -> str:
        """The stage that reported last, its share, and the time that it has left, as far as they
        are known.
        """
        now, seen = time.monotonic(), self._seen.copy()
        running = [stage for stage in seen if stage in self._started]
        if not running:
            return f"at work, {human_seconds(now - self._began)} so far"
        stage = running[-1]
        taken, (done, total) = now - self._started.get(stage, now), seen[stage]
        if not total or not done:
            return f"{stage}: {human_seconds(taken)} so far"
        left = taken * (total - done) / done
        return f"{stage}: {done / total:.0%}, about {human_seconds(left)} left"


def _bars(console: Console) -> Progress:
    unicode = speaks_unicode(console)
    return Progress(
        SpinnerColumn("dots" if unicode else "line", finished_text=" "),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_ASCII_BAR) if unicode else _AsciiBar(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
        # What libraries print to stdout while a bar is up is not ours to move: the command line
        # deals with it.
        redirect_stdout=False,
    )
