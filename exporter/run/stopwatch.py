"""What the stages of a run take: time, of the wall and of processors, pages, and memory."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calib.process.progress import Progress, silent

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STAT, _UPTIME = Path("/proc/self/stat"), Path("/proc/uptime")
_FORGET_PEAK = "5"
"""What sets the peak of the resident set back to what it is now (proc(5))."""
_STARTED_FIELD = 22
"""Of /proc/self/stat: when the process started, in clock ticks since the system did (proc(5))."""


@dataclass(frozen=True)
class Usage:
    """What something took.

    Attributes:
        seconds: of the wall.
        cpu: seconds of all processors, user's and system's.
        system: those of the system alone; 0 where it does not say.
        faults: pages that the system made or mapped; 0 where it does not say.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    system: float = 0.0
    faults: int = 0

    @classmethod
    def now(cls) -> Usage:
        """Of this process so far; ``seconds`` of a clock that began at some time."""
        try:
            import resource
        except ImportError:  # on Windows
            return cls(time.perf_counter(), time.process_time())
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = used.ru_utime + used.ru_stime
        return cls(time.perf_counter(), cpu, used.ru_stime, used.ru_minflt + used.ru_majflt)

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.seconds + other.seconds,
            self.cpu + other.cpu,
            self.system + other.system,
            self.faults + other.faults,
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.seconds - other.seconds,
            self.cpu - other.cpu,
            self.system - other.system,
            self.faults - other.faults,
        )


@dataclass
class _Running:
    """A stage that has begun.

    Attributes:
        inside: what the stages inside it have taken.
        peak: the most memory that was resident before the last of them ended.
    """

    inside: Usage = Usage()
    peak: int = 0


@dataclass
class Stopwatch:
    """Measures the stages of a run, and tells them whom to report their progress to."""

    progress: Progress = silent
    """Called after every unit of work."""
    taken: dict[str, Usage] = field(default_factory=dict)
    """By stage."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """The most memory that was resident, by stage; empty where the system does not say."""
    _started: Usage = field(default_factory=Usage.now)
    _running: list[_Running] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage. One that is entered again (once per candidate) adds up; what a stage
        inside it takes is that one's alone.
        """
        if self._running:
            self._running[-1].peak = max(self._running[-1].peak, peak_resident() or 0)
        own = _Running()
        self._running.append(own)
        start = Usage.now()
        _forget_peak()
        try:
            yield
        finally:
            self._running.remove(own)
        whole = Usage.now() - start
        peak = max(own.peak, peak_resident() or 0)

        self.taken[name] = self.taken.get(name, Usage()) + whole - own.inside
        if peak:
            self.peak_bytes[name] = max(peak, self.peak_bytes.get(name, 0))
        if self._running:
            outer = self._running[-1]
            outer.inside += whole
            outer.peak = max(outer.peak, peak)
            _forget_peak()

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock time by stage."""
        return {name: usage.seconds for name, usage in self.taken.items()}

    @contextmanager
    def within(self, what: str) -> Iterator[None]:
        """Whatever is reported in the block is reported as a part of ``what``: a bar for each stage
        of each candidate. Times add up as they do without.
        """
        outer = self.progress
        self.progress = lambda stage, done, total: outer(f"{what}: {stage}", done, total)
        try:
            yield
        finally:
            self.progress = outer

    def figures(self) -> dict[str, Any]:
        """For a report, by the names of its fields; the time between stages is one of its own."""
        return {
            "seconds": {**self.seconds, "other": max(0.0, self._between().seconds)},
            "cpu_seconds": {name: usage.cpu for name, usage in self.taken.items()},
            "peak_bytes": dict(self.peak_bytes),
        }

    def profile(self) -> dict[str, Any]:
        """All that is known of every stage, of what was between them (``other``), and of what the
        process had done before the run (``start``: imports), which together are the whole process.
        """
        before = _age()
        started = replace(self._started, seconds=0.0 if before is None else before - self._since())
        stages = {"start": started, **self.taken, "other": self._between()}
        return {
            "unit": {"seconds": "s", "cpu": "s", "system": "s", "peak": "bytes resident"},
            "stages": {
                name: {
                    "seconds": round(usage.seconds, 3),
                    "cpu": round(usage.cpu, 3),
                    "system": round(usage.system, 3),
                    "faults": usage.faults,
                    "peak": self.peak_bytes.get(name),
                }
                for name, usage in stages.items()
            },
        }

    @contextmanager
    def profiled(self, path: Path | None) -> Iterator[None]:
        """Write :meth:`profile` to ``path`` at the end of the block, however it ends; nothing
        without one.
        """
        try:
            yield
        finally:
            if path is not None:
                path.write_text(json.dumps(self.profile(), indent=2) + "\n", encoding="utf-8")

    def copy(self) -> Stopwatch:
        """One that has taken the same times, and goes on by itself."""
        return replace(self, taken=dict(self.taken), peak_bytes=dict(self.peak_bytes), _running=[])

    def include(self, copy: Stopwatch, before: Stopwatch) -> None:
        """Take in what ``copy`` has measured since it was made from ``before``."""
        for name, usage in copy.taken.items():
            more = usage - before.taken.get(name, Usage())
            self.taken[name] = self.taken.get(name, Usage()) + more
        for name, peak in copy.peak_bytes.items():
            self.peak_bytes[name] = max(peak, self.peak_bytes.get(name, 0))

    def _between(self) -> Usage:
        """What no stage has taken since the watch was started."""
        left = Usage.now() - self._started
        for usage in self.taken.values():
            left -= usage
        return left

    def _since(self) -> float:
        return time.perf_counter() - self._started.seconds


def _age() -> float | None:
    """Seconds since this process was started, where the system says."""
    try:
        # the name of the program, in parentheses, may hold spaces
        fields = _STAT.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        uptime = float(_UPTIME.read_text(encoding="ascii").split()[0])
        return uptime - int(fields[_STARTED_FIELD - 3]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None


def _forget_peak() -> None:
    with suppress(OSError):
        _CLEAR.write_text(_FORGET_PEAK)


def peak_resident() -> int | None:
    """The most bytes that were resident since that was last set back (VmHWM)."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])
