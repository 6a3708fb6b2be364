"""What a command takes, its children included: for benchmarks.job. Linux only."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_INTERVAL = 0.05
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Taken:
    """What a command took.

    Attributes:
        wall, user, system: seconds.
        anonymous: the most bytes that no file backs, of all its processes together.
        faults: pages that were made for it.
        code: what it ended with.
        said: the end of what it wrote to stderr.
    """

    wall: float
    user: float
    system: float
    anonymous: int
    faults: int
    code: int
    said: str

    @property
    def cpu(self) -> float:
        """Seconds of all processors."""
        return self.user + self.system


def watched(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Taken:
    """Run ``command`` to its end.

    Args:
        command: program and arguments.
        log: takes what it writes.
        environment: variables beside those of this process.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **environment}
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(map(_anonymous, _tree(process.pid))))
            time.sleep(_INTERVAL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Taken(
        wall=wall,
        user=after.ru_utime - before.ru_utime,
        system=after.ru_stime - before.ru_stime,
        anonymous=peak,
        faults=after.ru_minflt - before.ru_minflt,
        code=process.returncode,
        said=log.read_text(encoding="utf-8", errors="replace").strip()[-300:],
    )


def _tree(pid: int) -> Iterator[int]:
    """``pid`` and all that it has started, directly or not."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            started = children.read_text(encoding="ascii").split()
        except OSError:  # it has ended
            continue
        for child in started:
            yield from _tree(int(child))


def _anonymous(pid: int) -> int:
    """RssAnon of a process (proc(5)), in bytes; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
