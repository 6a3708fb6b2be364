"""Runs of the whole pipeline on a few short rows, and figures of their reports."""

from __future__ import annotations

from exporter.recipe import Recipe, load_recipe
from exporter.reporting.report import ParityRow, Report

FEW = {
    "calibration.nsamples": 8,
    "calibration.seqlen": 64,
    "gate.nsamples": 2,
    "evaluation.nsamples": 4,
    "rotation.r1_tokens": 512,
    "rotation.r2_tokens": 128,
    "rotation.r1.epochs": 2,
    "rotation.r2.epochs": 2,
}


def few(**changes: object) -> Recipe:
    """A recipe for the embedded model, keys with ``__`` for dots."""
    return load_recipe(
        None, {**FEW, **{key.replace("__", "."): value for key, value in changes.items()}}
    )


def parity_row(report: Report, rung: int, name: str, metric: str = "relative L2") -> ParityRow:
    """The only row of that rung and metric with ``name`` in its own."""
    found = [
        row
        for row in report.parity
        if row.rung == rung and name in row.name and row.metric == metric
    ]
    assert len(found) == 1, [row.name for row in report.parity]
    return found[0]


def measured(report: Report, rung: int, name: str, metric: str = "relative L2") -> float:
    """What it measured."""
    value = parity_row(report, rung, name, metric).measured
    assert value is not None
    return value
