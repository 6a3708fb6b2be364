"""How the process of the command line uses the machine: settled once, before torch is loaded, which
reads it then. Who uses rotq as a library settles it himself.

In a container, the cores that a process may use up (cgroup quota) are fewer than those that it may
run on, and of a thread for each of the latter most wait for the others.

Threads of OpenMP wait for each other at the end of every operator, by looking again and again.
Where another process has the core, whoever should come cannot, and all looking is in vain. So they
look for a fraction of a millisecond, longer than the way from one operator to the next, and then
sleep (``python -m benchmarks.shared_machine``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

_THREADS = "OMP_NUM_THREADS"
_SPINS = "GOMP_SPINCOUNT"
_ASKED = (_SPINS, "OMP_WAIT_POLICY")
"""What a user sets who knows better how threads should wait; read by libgomp as it is loaded."""
SPINS = 10_000
"""How often a thread looks before it sleeps, where libgomp would 300,000 times."""

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def settle(threads: int | None = None) -> None:
    """Settle how many threads an operator gets, and how long they wait for each other awake; what
    the user's environment says stays.

    Args:
        threads: as many, whatever the environment says; ``None``: a core each, as far as they may
            be used up.
    """
    if threads is not None:
        os.environ[_THREADS] = str(threads)
    elif usable_cores() < runnable_cores():
        os.environ.setdefault(_THREADS, str(usable_cores()))
    if not any(name in os.environ for name in _ASKED):
        os.environ[_SPINS] = str(SPINS)


def runnable_cores() -> int:
    """Cores that this process may run on: under taskset fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> int:
    """Cores that this process may use up: in a container with a quota fewer than it may run on."""
    quota = cgroup_quota()
    return runnable_cores() if quota is None else max(1, min(runnable_cores(), int(quota + 0.5)))


def cgroup_quota(root: Path = _CGROUP, own: Path = _OWN_CGROUP) -> float | None:
    """CPU seconds a second that this process may take, the least of its groups; ``None`` where
    nothing limits it.

    Args:
        root: where the hierarchies are mounted, of version 2 or 1.
        own: says which group of each is this process's (cgroups(7)).
    """
    try:
        lines = os.fsdecode(own.read_bytes()).split("\n")
    except OSError:
        return None

    found: list[float] = []
    for line in lines:
        parts = line.split(":", 2)
        if len(parts) != 3 or "\0" in line:
            continue
        _, controllers, group = parts
        if not controllers:  # version 2
            found += _limits(root, group, _of_version_2)
        elif "cpu" in controllers.split(","):
            found += _limits(root / "cpu", group, _of_version_1)
    return min(found, default=None)


def _limits(root: Path, group: str, read: Callable[[Path], float | None]) -> list[float]:
    """Those of a group and of all above it; in a container the root is the group itself."""
    folder = root / group.lstrip("/")
    places = [folder, *folder.parents]
    within = places[: places.index(root) + 1] if root in places else [root]
    return [limit for place in within if (limit := read(place)) is not None]


def _of_version_2(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    return _quotient(*words) if len(words) == 2 else None


def _of_version_1(folder: Path) -> float | None:
    words = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
    return _quotient(*words) if len(words) == 2 else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, ValueError):
        return []


def _quotient(quota: str, period: str) -> float | None:
    """``max`` (version 2) and -1 (version 1) say that there is no limit."""
    try:
        microseconds, every = int(quota), int(period)
        return microseconds / every if microseconds > 0 and every > 0 else None
    except (ValueError, OverflowError):
        return None
