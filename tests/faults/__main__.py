"""Run the faults.

python -m tests.faults [kills] [disk] [damage] [--most N] [--only TEXT] [--workers N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

from tests.faults.cases import CASES, Stage, set_stage
from tests.faults.children import quiet_libraries
from tests.faults.damage import KEPT, damages
from tests.faults.disk import full_disks
from tests.faults.findings import Table
from tests.faults.kills import kills

PARTS = ("kills", "disk", "damage")
GROUPS = {"kills": "kill -9", "disk": "full disk", "damage": "damaged"}
"""What the names of their rows in the table begin with."""
LEAST = {"kills": 600, "disk": 600, "damage": 300}
"""Faults of a part that is run whole: fewer would show less than the suite is there to show."""


def main() -> int:
    """Run what is asked for; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--most", type=int, help="faults of a kind in a command or file; all")
    parser.add_argument("--only", default="", help="commands and folders with this in their name")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at once")
    given = parser.parse_args()
    parts = given.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")

    table, start = Table(), time.monotonic()
    forked = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory(prefix="rotq-faults-") as name,
        ProcessPoolExecutor(given.workers, mp_context=forked) as workers,
    ):
        jobs = list(_jobs(parts, given.only))
        for found in workers.map(partial(_run, Path(name), given.most), jobs):
            table.take(found)
    print("\n".join(table.lines()))
    print(f"{time.monotonic() - start:.0f} s")

    whole = [part for part in parts if given.most is None and not given.only]
    few = [part for part in whole if table.count(GROUPS[part]) < LEAST[part]]
    if few:
        print(f"fewer than there should be: {', '.join(few)}")
    return 1 if table.wrong or few else 0


def _jobs(parts: Sequence[str], only: str) -> Iterator[tuple[str, str]]:
    """A part, and the command or folder."""
    for part in PARTS:
        names = [each.name for each in (KEPT if part == "damage" else CASES)]
        yield from ((part, name) for name in names if part in parts and only in name)


def _run(root: Path, most: int | None, job: tuple[str, str]) -> Table:
    part, name = job
    stage, table = _stage(root), Table()
    own = stage.folder / "case"
    if part == "damage":
        kept = [each for each in KEPT if each.name == name]
        damages(stage, own, table, most=most, kept=kept)
    else:
        cases = [each for each in CASES if each.name == name]
        put_in = kills if part == "kills" else full_disks
        put_in(stage, own, table, most=most, cases=cases)
    return table


@cache
def _stage(root: Path) -> Stage:
    """That of this process, in a folder of its own below ``root``."""
    folder = Path(tempfile.mkdtemp(dir=root))
    os.environ |= {"ROTQ_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "temporary")}
    tempfile.tempdir = None  # asked for already
    (folder / "temporary").mkdir()
    quiet_libraries()
    return set_stage(folder)


if __name__ == "__main__":
    sys.exit(main())
