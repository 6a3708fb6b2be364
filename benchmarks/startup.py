"""Cold start of the command line: seconds, and as a ratio to starting Python alone, in one run.

python -m benchmarks.startup
"""

from __future__ import annotations

import subprocess
import sys
import time

COMMANDS = (["--help"], ["export", "--help"], ["backends"], ["export", "--no-such-option"])
RUNS = 5


def main() -> None:
    """Print the best of :data:`RUNS` for each command: the smallest, because other processes may
    share the machine.
    """
    python = seconds([sys.executable, "-c", "pass"])
    print(f"{'python alone':<30} {python:.3f} s")
    for arguments in COMMANDS:
        taken = seconds([sys.executable, "-m", "exporter.cli", *arguments])
        print(f"{'rotq ' + ' '.join(arguments):<30} {taken:.3f} s   {taken / python:.1f} x python")


def seconds(command: list[str]) -> float:
    """Wall-clock time of the fastest run."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
