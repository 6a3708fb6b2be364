"""A few of the faults that ``make faults`` puts in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed")
def test_killed_processes_full_disks_and_damaged_bytes() -> None:
    command = [sys.executable, "-m", "tests.faults", "--most", "1", "--only", "capture"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for group in ("kill -9: capture", "full disk: capture", "damaged: capture"):
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(group))
        assert line.endswith("0 wrong")
