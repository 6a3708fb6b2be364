"""Printing what ``rotq stats`` found. No decisions are made here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from exporter.console.show import show_line, show_rotation_gate, show_table
from exporter.reporting import summary
from exporter.reporting.summary import Table

if TYPE_CHECKING:
    from exporter.reporting.stats import LinearRow, PhaseFigures, StatsReport

_FIGURES = ("damage", "input error", "weight error", "kurtosis", "outliers")
"""Kurtosis and outliers are those of the input; ``stats.csv`` has all figures."""


def show_stats(console: Console, report: StatsReport, folder: Path, shown: int | None) -> None:
    """Print the summary of ``rotq stats``.

    Args:
        console: where.
        report: what was found.
        folder: where it was written.
        shown: rows of the table, the most damaged; ``None`` for all.
    """
    show_line(
        console,
        f"{summary.source_words(report.model.source)}: {report.model.model_type}, "
        f"{report.model.parameters:,} parameters",
    )
    calibration = report.calibration
    show_line(
        console,
        f"calibration: {calibration.rows} rows, {calibration.tokens:,} tokens of"
        f" {calibration.dataset}",
    )
    show_rotation_gate(console, report.rotation_gate)
    rows = report.linears[:shown]
    show_table(console, damage_table(report, rows))
    if len(rows) < len(report.linears):
        show_line(
            console,
            f"{len(report.linears) - len(rows)} more in {folder / 'stats.csv'}; -v shows all",
        )
    show_line(console, f"{folder} ({report.scheme}, rotate {report.rotate})", "green")


def damage_table(report: StatsReport, rows: list[LinearRow]) -> Table:
    """One row for each linear; every figure before and, where something is rotated, after."""
    rotated = report.rotate != "none"
    clusters = report.clusters
    measured = (
        f"{report.scheme}, activations by {clusters.clusters} clusters"
        if clusters
        else report.scheme
    )
    header = [
        title for name in _FIGURES for title in ((name, f"{name} after") if rotated else (name,))
    ]
    return Table(
        f"Damage ({measured}): relative squared error of outputs"
        + (", before and after rotation" * rotated),
        ("linear", *header),
        tuple((row.linear, *_cells(row)) for row in rows),
        right=frozenset(range(1, len(header) + 1)),
    )


def _cells(row: LinearRow) -> list[str]:
    before = _phase(row.before)
    if row.after is None:
        return before
    return [cell for pair in zip(before, _phase(row.after), strict=True) for cell in pair]


def _phase(figures: PhaseFigures) -> list[str]:
    return [
        f"{figures.damage:.1e}",
        f"{figures.input_error:.1e}",
        f"{figures.weight_error:.1e}",
        f"{figures.input.kurtosis:.1f}",
        f"{figures.input.outliers:.1e}",
    ]
