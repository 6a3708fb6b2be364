"""Two exports at once against one after the other, and one alone against libgomp's own waiting.

    python -m benchmarks.shared_machine [-m MODEL] [--nsamples 8] [--spins default ours passive]

For each way in which threads wait (``ours``: what :mod:`exporter.process` settles; ``default``: as
libgomp does where nobody says anything, a wait policy of that name; a number: ``GOMP_SPINCOUNT``)
prints seconds and CPU seconds of one run alone, of two at once, the second over twice the first
(bar 1.05), and the first over that of ``default`` (bar 1.02). Means little beside other work: CPU
seconds are what then still compares.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from exporter.process import SPINS

_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_LIBGOMP = 300_000
"""What libgomp takes where neither is set and threads are no more than cores (libgomp manual)."""


@dataclass(frozen=True)
class Used:
    """What runs took together."""

    seconds: float
    cpu: float


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("-m", "--model", default="embedded")
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--rotate", default="r1,r2")
    parser.add_argument("--spins", nargs="+", default=["default", "ours", "passive"])
    given = parser.parse_args()

    arguments = ["-m", given.model, "--nsamples", str(given.nsamples), "--rotate", given.rotate]
    print("waiting     alone s  alone cpu   two s  two cpu  two / (2 alone)  alone / first")
    first = None
    for waiting in given.spins:
        alone, two = (runs(count, arguments, environment(waiting)) for count in (1, 2))
        first = first or alone
        print(
            f"{waiting:<10} {alone.seconds:8.1f} {alone.cpu:10.1f} {two.seconds:7.1f}"
            f" {two.cpu:8.1f} {two.seconds / (2 * alone.seconds):16.2f}"
            f" {alone.seconds / first.seconds:14.2f}",
            flush=True,
        )


def environment(waiting: str) -> dict[str, str]:
    """The environment of a run whose threads wait so."""
    rest = {name: value for name, value in os.environ.items() if name not in _WAITING}
    if waiting in ("active", "passive"):
        return {**rest, "OMP_WAIT_POLICY": waiting}
    spins = {"ours": str(SPINS), "default": str(_LIBGOMP)}.get(waiting, waiting)
    return {**rest, "GOMP_SPINCOUNT": spins}


def runs(count: int, arguments: list[str], environ: dict[str, str]) -> Used:
    """As many calibrations at once, each with all threads."""
    command = [sys.executable, "-m", "exporter.cli", "calibrate", "-q", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen([*command, "-o", str(Path(folder) / str(index))], env=environ)
            for index in range(count)
        ]
        codes = [process.wait() for process in processes]
    seconds = time.perf_counter() - began
    if any(codes):
        raise SystemExit(f"a run failed: exit codes {codes}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Used(seconds, used)


if __name__ == "__main__":
    main()
