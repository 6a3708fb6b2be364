"""A sweep of 12 points over the embedded model, killed and resumed, against one that was not:
``python -m benchmarks.sweep --work DIR [--jobs N]``.

Prints how many points were there when it was killed, how long each took, and how many of the
resumed results and files of weights differ: none should.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from exporter.sweeping.sweep import POINTS, read_sweep

GRID = (
    *("--schemes", "int8,int8-weight-only,int4-weight-only"),
    *("--rotations", "none", "--rotations", "r1"),
    *("--rotations", "r1,r2", "--rotations", "r1,r2,r4"),
)
FEW = ("--nsamples", "16", "--seqlen", "128", "--eval-nsamples", "4", "--gate-nsamples", "2")
KILLED_AFTER = 5
"""Points that are there when it is killed."""


def main() -> int:
    """Run both and print the line; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    broken, whole = given.work / "broken", given.work / "whole"
    given.work.mkdir(parents=True, exist_ok=True)

    killed = subprocess.Popen(_command(broken, given.jobs))
    while killed.poll() is None and len(_made(broken)) < KILLED_AFTER:
        time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    there = len(_made(broken))
    resumed = _timed([*_command(broken, given.jobs), "--resume"])
    unbroken = _timed(_command(whole, given.jobs))

    pairs = zip(read_sweep(broken).points, read_sweep(whole).points, strict=True)
    results = sum(one != other for one, other in pairs)
    files = sum(
        (broken / POINTS / name).read_bytes() != (whole / POINTS / name).read_bytes()
        for name in (f"{point.name}/model.onnx.data" for point in read_sweep(whole).points)
    )
    total = len(read_sweep(whole).points)
    sys.stdout.write(
        f"{total} points, {given.jobs} at once: killed with {there} there, resumed in"
        f" {resumed:.0f} s, unbroken {unbroken:.0f} s; results that differ {results}, files that"
        f" differ {files}\n"
    )
    return int(bool(results or files))


def _command(output: Path, jobs: int) -> list[str]:
    own = ("--no-speed", "-q", "--jobs", str(jobs), "-o", str(output))
    return [sys.executable, "-m", "exporter.cli", "sweep", *GRID, *FEW, *own]


def _made(folder: Path) -> list[Path]:
    return list(folder.glob(f"{POINTS}/*/report.json"))


def _timed(command: list[str]) -> float:
    start = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"the sweep ended with {code}")
    return time.monotonic() - start


if __name__ == "__main__":
    raise SystemExit(main())
