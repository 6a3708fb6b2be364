"""``python -m tests.sabotage [NAME ...]``: every fault, or those whose name, setup or purpose holds
one of the words; exit code 1 where fewer than 95 of 100 are caught, one that is not is not
explained, or one was lifted.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path

from tests.sabotage.run import SABOTAGES, Outcome, Verdict, Workshop, table, wrong

Verdicts = tuple[Verdict | None, Verdict | None]
"""At export, and by verify."""
_TOGETHER = 20
"""Faults of one setup that one process runs: each calibrates what it needs of a setup anew."""


def main() -> int:
    """Run them and print the table, and what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.sabotage", description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at once")
    options = parser.parse_args()
    numbers = [
        number
        for number, each in enumerate(SABOTAGES)
        if not options.words
        or any(word in f"{each.setup} {each.name} {each.what}" for word in options.words)
    ]

    outcomes: dict[int, Outcome] = {}
    forked = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory(prefix="rotq-sabotage-") as folder,
        ProcessPoolExecutor(options.workers, mp_context=forked) as workers,
    ):
        os.environ["ROTQ_CACHE"] = folder
        for done in workers.map(partial(_run, Path(folder)), _parts(numbers)):
            for number, verdicts in done.items():
                outcomes[number] = Outcome(SABOTAGES[number], *verdicts)
            print(f"{len(outcomes)} of {len(numbers)}", file=sys.stderr, flush=True)
    found = [outcomes[number] for number in numbers]
    print(table(found))
    complaints = wrong(found, whole=not options.words)
    print("\n".join(complaints))
    return int(bool(complaints))


def _parts(numbers: Sequence[int]) -> Iterator[list[int]]:
    """The faults with these numbers, some of one setup at a time, the most first."""
    by_setup = sorted(numbers, key=lambda number: SABOTAGES[number].setup)
    groups = [list(each) for _, each in groupby(by_setup, lambda at: SABOTAGES[at].setup)]
    for group in sorted(groups, key=len, reverse=True):
        for start in range(0, len(group), _TOGETHER):
            yield group[start : start + _TOGETHER]


def _run(folder: Path, numbers: Sequence[int]) -> dict[int, Verdicts]:
    """What export and verify said; a sabotage itself does not pass from process to process."""
    logging.disable(logging.WARNING)  # of short texts, a hundred times
    workshop = Workshop(Path(tempfile.mkdtemp(dir=folder)))
    found: dict[int, Verdicts] = {}
    for number in numbers:
        outcome = workshop.run(SABOTAGES[number])
        found[number] = (outcome.exported, outcome.verified)
        said = "MISSED" if outcome.missed else outcome.first.by[:80]
        print(f"{SABOTAGES[number].name}: {said}", file=sys.stderr, flush=True)
    shutil.rmtree(workshop.folder)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
