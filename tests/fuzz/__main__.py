"""``python -m tests.fuzz``: every kind for a while, each in a process of its own, and a table."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import SystemRandom

from tests.fuzz import pristine, readers
from tests.fuzz.examine import IDLE, Failure, limit_memory
from tests.fuzz.kinds import KINDS, Kind, kind_named
from tests.fuzz.worker import Inputs, Tally, place, run

MEMORY = 3 * 2**30
"""Bytes that a process may take beside what it begins with."""
_STUCK = 60
"""Seconds on one input after which its process is ended: some code lets no signal through."""
_COLUMNS = ("traceback", "hang", "code run", "memory")


def main() -> int:
    """Run the kinds asked for; 1 where anything failed."""
    options = _options()
    seed = SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    os.environ.update(readers.settings())
    kinds = [kind for kind in KINDS if not options.kinds or kind.name in options.kinds.split(",")]
    failures = Path(options.failures).resolve()
    with tempfile.TemporaryDirectory(prefix="rotq-fuzz-") as name:
        scratch = Path(name)
        os.environ["ROTQ_CACHE"] = str(scratch / "user-cache")
        source = Path(options.pristine).resolve() if options.pristine else scratch / "pristine"
        if not (source / "all").is_dir():
            source.mkdir(parents=True, exist_ok=True)
            pristine.build(source)
        forked = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.workers, mp_context=forked) as workers:
            running = [
                workers.submit(
                    _fuzzed, kind.name, source, scratch / f"{i}", seed, options, failures
                )
                for i, kind in enumerate(kinds)
            ]
            tallies = [each.result() for each in running]
    _print_table(tallies)
    return int(any(tally.found for tally in tallies))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for each kind")
    parser.add_argument("--inputs", type=int, default=10**9, help="of each kind at most")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="kinds at once")
    parser.add_argument("--seed", type=int, help="by default another one each time")
    parser.add_argument("--kinds", help="names, with commas; by default all")
    parser.add_argument("--failures", default="out/fuzz", help="where inputs that failed are kept")
    parser.add_argument("--pristine", help="where the folders to damage are kept between runs")
    return parser.parse_args()


def _fuzzed(
    name: str, source: Path, scratch: Path, seed: int, options: argparse.Namespace, failures: Path
) -> Tally:
    """One kind; a process that dies or sticks is a failure, and another one goes on behind it."""
    kind, tally = kind_named(name), Tally(name)
    if kind.needs and not _is_installed(kind.needs):
        print(f"{kind.name}: skipped, {kind.needs} is not installed", flush=True)
        return tally
    scratch.mkdir()
    until = time.monotonic() + options.seconds
    state = scratch / "state.json"
    while tally.inputs < options.inputs and time.monotonic() < until:
        inner = Path(tempfile.mkdtemp(dir=scratch))
        arguments = (kind, source, inner, seed, tally, until, options.inputs, failures, state)
        process = multiprocessing.get_context("fork").Process(target=_work, args=arguments)
        process.start()
        stuck = _watched(process, inner / "input")
        tally = _read(state, tally, inner / "input")
        if process.exitcode != 0:
            what = "hang" if stuck else "traceback"
            failure = Failure(what, f"the process ended with {process.exitcode}", "")
            tally.found[what] += 1
            tally.distinct.setdefault(failure.key, f"{what}: {failure.where}")
            again = Inputs(kind, source, inner, seed)
            again.keep(place(failures, kind, failure), tally.inputs - 1, failure, {})
        os.chdir(source)
        shutil.rmtree(inner, ignore_errors=True)
        if process.exitcode == 0 or tally.found["hang"] >= 5:
            break
    told = [f"{kind.name}: {tally.inputs} inputs, {dict(tally.found) or 'no failure'}"]
    told += [f"    {key} {where}" for key, where in tally.distinct.items()]
    print("\n".join(told), flush=True)
    return tally


def _work(
    kind: Kind,
    source: Path,
    scratch: Path,
    seed: int,
    tally: Tally,
    until: float,
    most: int,
    failures: Path,
    state: Path,
) -> None:
    limit_memory(MEMORY)
    logging.disable(logging.WARNING)  # of libraries, about what they are given
    inputs = Inputs(kind, source, scratch, seed)
    while tally.inputs < most and time.monotonic() < until:
        run(inputs, tally, until=until, most=min(most, tally.inputs + 20), failures=failures)
        state.write_text(json.dumps(vars(tally)))
        if tally.found["hang"] >= 5:
            break


def _watched(process: BaseProcess, beat: Path) -> bool:
    """Wait for ``process``; whether it had to be ended, as its input did not change any more."""
    last, since, before = "", time.monotonic(), 0.0
    while process.is_alive():
        process.join(0.5)
        now = beat.read_text() if beat.is_file() else ""
        if now != last:
            last, since, before = now, time.monotonic(), _worked(process)
        used = _worked(process) - before
        if time.monotonic() - since > _STUCK and (used > _STUCK or used < IDLE * _STUCK):
            process.kill()
            process.join()
            return True
    return False


def _worked(process: BaseProcess) -> float:
    """Seconds that a process has worked, in all."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read(state: Path, before: Tally, beat: Path) -> Tally:
    """What a process told, up to the input at which it ended."""
    told = json.loads(state.read_text()) if state.is_file() else vars(before)
    tally = Tally(told["kind"], told["inputs"], Counter(told["found"]), told["distinct"])
    reached = int(beat.read_text().split()[1]) + 1 if beat.is_file() else 0
    tally.inputs = max(tally.inputs, reached)
    return tally


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def _print_table(tallies: list[Tally]) -> None:
    rows = [("kind", "inputs", *_COLUMNS)]
    rows += [
        (tally.kind, f"{tally.inputs}", *(str(tally.found[column]) for column in _COLUMNS))
        for tally in tallies
    ]
    total = [sum(int(row[column]) for row in rows[1:]) for column in range(1, len(rows[0]))]
    rows.append(("all", *map(str, total)))
    for kind, *figures in rows:
        print(f"{kind:<28}" + "".join(f"{figure:>13}" for figure in figures), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
