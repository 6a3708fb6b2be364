"""How long the stages of a run take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from calib.progress import Progress, silent


@dataclass
class Stopwatch:
    """Times the stages of a run, and tells them whom to report their progress to."""

    progress: Progress = silent
    """Called after every unit of work."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock time by stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage. One that is entered again (once per candidate) adds up."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def copy(self) -> Stopwatch:
        """One that has taken the same times, and goes on by itself."""
        return Stopwatch(self.progress, dict(self.seconds))
