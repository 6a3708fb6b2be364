"""``rotq sweep``: a grid of exports, each in a process of its own, and what each costs and gives.

The folder of a sweep holds ``sweep.yaml`` (the recipe that all points share, and the grid), a
folder ``points`` with an export for each point, the statistics that they share (``capture``), and
at the end ``sweep.json``. A point that is there whole is not made again, so that a sweep that was
ended goes on. Imports no torch: the processes do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from calib.errors import OutputError, RotqError
from calib.files.reading import read_json
from calib.process.progress import Progress, silent
from exporter.environment import free_memory
from exporter.output import HOLDER_FILE, LOCK_FILE, locked, making, replace_text
from exporter.planning.plan import plan
from exporter.process import usable_cores
from exporter.recipe import Recipe
from exporter.reporting.exported import check_unchanged, is_export, read_report
from exporter.reporting.report import Report
from exporter.run.options import RunOptions
from exporter.sweeping.points import Point, PointResult, points_of, with_pareto

SWEEP_FILE, RESULTS_FILE, POINTS, CAPTURE = "sweep.yaml", "sweep.json", "points", "capture"
_SPEED = ".speed.json"


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep runs; nothing of it changes a point."""

    output: Path
    resume: bool = False
    jobs: int | None = None
    """Processes at once; ``None``: as many as ``max_memory`` and the cores allow."""
    max_memory: int | None = None
    """Bytes that all of them may take; ``None``: what is free."""
    speed: bool = True
    """Measure tokens per second, one point after the other, at the end."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found."""

    output: Path
    points: tuple[PointResult, ...]
    jobs: int = 1

    @property
    def best(self) -> list[PointResult]:
        """The points that no other one beats in everything."""
        return [point for point in self.points if point.pareto]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json`` and :data:`RESULTS_FILE`."""
        return {"output": str(self.output), "points": [asdict(point) for point in self.points]}


def sweep(
    recipe: Recipe,
    grid: Mapping[str, Sequence[str]],
    options: SweepOptions,
    *,
    progress: Progress = silent,
) -> SweepResult:
    """Export every point of a grid, and compare them.

    Args:
        recipe: what all points have in common.
        grid: values by dotted recipe key.
        options: where, and how many at once.
        progress: called after each point.

    Raises:
        RotqError: the grid is none, the folder holds another sweep, or every point is refused
            before anything has run. What refuses or ends a single point is in its result.
    """
    points = points_of(recipe, grid)
    peaks, refused = _planned(points, options)
    jobs = options.jobs or _jobs(peaks, options)

    output = options.output
    with making(output), locked(output, f"the sweep '{output}'", "wait for it to end"):
        _claim(output, recipe, grid, resume=options.resume)
        (output / POINTS).mkdir(exist_ok=True)
        run = _Run(output, jobs, progress, len(points))
        results = run.exports(points, refused)
        if options.speed:
            results = run.speeds(results)
        found = SweepResult(output, tuple(with_pareto(results)), jobs)
        replace_text(output / RESULTS_FILE, json.dumps(found.as_dict(), indent=2) + "\n")
    return found


def _planned(
    points: Sequence[Point], options: SweepOptions
) -> tuple[list[int], dict[str, PointResult]]:
    """Peak memory of the points that can be run, in bytes, and those that a run would refuse.

    Raises:
        RotqError: all of them are.
    """
    peaks: list[int] = []
    refused: dict[str, PointResult] = {}
    for point in points:
        try:
            planned = plan(point.recipe, RunOptions(options.output / POINTS / point.name))
        except RotqError as error:
            refused[point.name] = PointResult(point.name, "error", error=error.message)
            if len(refused) == len(points):
                raise
        else:
            peaks.append(planned.peak_memory)
    return peaks, refused


def _jobs(peaks: Sequence[int], options: SweepOptions) -> int:
    """How many fit side by side."""
    budget = options.max_memory or free_memory() or max(peaks)
    return max(1, min(usable_cores(), len(peaks), budget // max(1, *peaks)))


def _claim(
    output: Path, recipe: Recipe, grid: Mapping[str, Sequence[str]], *, resume: bool
) -> None:
    """Write down what the sweep is, or see that it is the one that is there.

    Raises:
        OutputError: the folder holds another sweep, or this one without ``resume``, or other files.
    """
    own = yaml.safe_dump(
        {"grid": {key: list(values) for key, values in grid.items()}, "recipe": recipe.to_yaml()},
        sort_keys=False,
    )

    path = output / SWEEP_FILE
    if path.is_file():
        if not resume:
            raise OutputError(
                f"'{output}' holds a sweep already", hint="give --resume to go on, or another -o"
            )
        if path.read_text(encoding="utf-8") != own:
            raise OutputError(
                f"'{output}' holds a sweep over another grid, or from another recipe",
                hint="repeat its command, or give another -o",
            )
        return
    own_files = {LOCK_FILE, HOLDER_FILE}
    if any(each.name not in own_files for each in output.iterdir()):
        raise OutputError(f"'{output}' is not empty, and holds no sweep", hint="give another -o")
    replace_text(path, own)


@dataclass
class _Run:
    """The processes of a sweep."""

    output: Path
    jobs: int
    progress: Progress
    total: int
    _running: set[subprocess.Popen[str]] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)

    def exports(
        self, points: Sequence[Point], refused: Mapping[str, PointResult]
    ) -> list[PointResult]:
        """Every point that is not refused; those that are there already are only read."""
        found = {point.name: refused.get(point.name) or self._there(point) for point in points}
        missing = [point for point in points if found[point.name] is None]
        done = len(points) - len(missing)
        self.progress("points", done, self.total)

        # the first that trains captures what the others use
        missing.sort(key=lambda point: not point.trains)
        for some in (missing[:1], missing[1:]):
            with ThreadPoolExecutor(self.jobs) as pool:
                futures = {pool.submit(self._export, point): point.name for point in some}
                try:
                    for future in as_completed(futures):
                        found[futures[future]] = future.result()
                        done += 1
                        self.progress("points", done, self.total)
                except BaseException:
                    self._end(pool)
                    raise
        return [result for result in found.values() if result is not None]

    def speeds(self, results: Sequence[PointResult]) -> list[PointResult]:
        """With tokens per second, one after the other: side by side they would starve each
        other.
        """
        measured = []
        for at, result in enumerate(results):
            rate = None if result.status == "error" else self._rate(result.name)
            measured.append(replace(result, rate=rate))
            self.progress("speed", at + 1, self.total)
        return measured

    def _folder(self, name: str) -> Path:
        return self.output / POINTS / name

    def _there(self, point: Point) -> PointResult | None:
        """The result of an export that an earlier run has finished."""
        folder = self._folder(point.name)
        if not is_export(folder):
            return None
        report = read_report(folder)
        check_unchanged(folder, report)
        return _result(point.name, report)

    def _export(self, point: Point) -> PointResult:
        recipe = self.output / POINTS / f".{point.name}.yaml"
        replace_text(recipe, point.recipe.to_yaml())
        try:
            folder = self._folder(point.name)
            document = self._child(
                *("export", recipe, folder, self.output / CAPTURE), threads=self._threads()
            )
        finally:
            recipe.unlink(missing_ok=True)
        if "error" in document:
            return PointResult(point.name, "error", error=str(document["error"]))
        return _result(point.name, read_report(folder))

    def _rate(self, name: str) -> float | None:
        """Measured once and kept, so that a sweep that goes on gives the figures that it gave."""
        kept = self.output / POINTS / f"{name}{_SPEED}"
        if not kept.is_file():
            document = self._child("speed", self._folder(name), threads=usable_cores())
            if "error" in document:
                return None
            replace_text(kept, json.dumps(document) + "\n")
        rate = read_json(kept).get("rate")
        return float(rate) if isinstance(rate, int | float) else None

    def _threads(self) -> int:
        return max(1, usable_cores() // self.jobs)

    def _child(self, *arguments: object, threads: int) -> dict[str, Any]:
        """What a process printed."""
        command = [sys.executable, "-m", "exporter.sweeping.child", *map(str, arguments)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        with self._lock:
            self._running.add(process)
        try:
            printed, complaint = process.communicate()
        finally:
            with self._lock:
                self._running.discard(process)
        try:
            document: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
        except (IndexError, ValueError):
            last = complaint.strip().splitlines()[-1:] or ["nothing was said"]
            return {"error": f"its process ended with {process.returncode}: {last[0]}"}
        return document

    def _end(self, pool: ThreadPoolExecutor) -> None:
        """End what runs, and begin nothing else."""
        pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for process in self._running:
                process.terminate()


def _result(name: str, report: Report) -> PointResult:
    figures = {row.metric: row for row in report.parity if row.rung == 3}
    quality, divergence = figures.get("perplexity ratio"), figures.get("KL")
    perplexities = report.evidence.perplexities
    return PointResult(
        name,
        report.status,
        nbytes=report.layers.bytes_after,
        perplexity=None if perplexities is None else perplexities[1],
        ratio=None if quality is None else quality.measured,
        kl=None if divergence is None else divergence.measured,
    )


def read_sweep(folder: Path) -> SweepResult:
    """The results of a finished sweep.

    Raises:
        OutputError: there are none.
    """
    try:
        rows = read_json(folder / RESULTS_FILE)["points"]
        return SweepResult(folder, tuple(PointResult(**row) for row in rows))
    except (OSError, ValueError, KeyError, TypeError, RotqError) as error:
        raise OutputError(
            f"'{folder}' holds no finished sweep: {error}", hint="run it again with --resume"
        ) from error
