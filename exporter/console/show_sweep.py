"""Printing what ``rotq sweep`` found. No decisions are made here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from exporter.console.show import show_line, show_table
from exporter.reporting.summary import Table

if TYPE_CHECKING:
    from exporter.sweeping.sweep import SweepResult

_HEADER = ("point", "MiB", "perplexity", "ratio", "KL", "tokens/s", "parity")


def show_sweep(console: Console, found: SweepResult) -> None:
    """Print the table, the smallest first; what nothing beats is marked."""
    points = sorted(found.points, key=lambda point: (point.nbytes is None, point.nbytes or 0))
    rows = tuple(
        (f"{'* ' if point.pareto else ''}{point.name}", *point.cells()[1:]) for point in points
    )
    marked = frozenset(at for at, point in enumerate(points) if point.pareto)
    title = f"{len(points)} points, {found.jobs} at once"
    show_table(console, Table(title, _HEADER, rows, right=frozenset(range(1, 6)), marked=marked))
    show_line(console, "* no other point is at least as good in size, perplexity and speed")
    show_line(console, f"{found.output}")
