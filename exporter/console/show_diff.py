"""Printing what ``rotq diff`` found. No decisions are made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from exporter.console.show import show_line, show_table
from exporter.reporting.summary import NAMES_SHOWN, Table

if TYPE_CHECKING:
    from exporter.commands.diff import Changed, Differences


def show_diff(console: Console, found: Differences, *, every: bool) -> None:
    """Print it.

    Args:
        console: where.
        found: what differs.
        every: name every linear, and not only the first few.
    """
    for title, rows in (
        ("Facts", found.facts),
        ("Recipe", found.recipe),
        ("Rotations", found.rotations if every else _folded(found.rotations)),
        ("Kept in float", found.kept),
        ("Parity", found.figures),
    ):
        cells = tuple((row.name, row.first, row.second) for row in rows)
        show_table(console, Table(title, ("", "first", "second"), cells))
    for names, words in (
        (found.numbers, "hold other numbers"),
        (found.only_first, "are in the first alone"),
        (found.only_second, "are in the second alone"),
    ):
        if names:
            shown = names if every else names[:NAMES_SHOWN]
            more = f" and {len(names) - len(shown)} more (-v)" if len(names) > len(shown) else ""
            show_line(console, f"{len(names)} tensors {words}: {', '.join(shown)}{more}")

    if found.same_numbers:
        show_line(console, f"{found.same_numbers} tensors hold the same numbers in both")
    if found.same:
        show_line(console, "the exported files are the same", "green")
    else:
        differing = ", ".join(row.name for row in found.files)
        show_line(console, f"{len(found.files)} files differ: {differing}")


def _folded(rows: Sequence[Changed]) -> Sequence[Changed]:
    """The first few: R2 has one for each layer."""
    return rows[: 2 * NAMES_SHOWN]
