"""Tables for the columns that a terminal has: words and numbers are never broken, as far as one
column beside the first fits.
"""

from __future__ import annotations

from dataclasses import replace

from exporter.reporting.summary import Table

GAP, EDGES = 3, 2
"""Characters between two columns, and of the two edges of a table."""
_NOTE = "note"


def fitted(table: Table, width: int) -> tuple[list[Table], list[str]]:
    """``table``, or tables that show the same in ``width`` characters, and lines below them.

    What has no room as it is loses its notes, which become lines; what still has none is split by
    columns, each part with the first column.
    """
    if least_width(table) <= width:
        return [table], []
    if _NOTE in table.header:
        note = table.header.index(_NOTE)
        lines = [f"{row[1]}, {row[2]}: {row[note]}" for row in table.rows if row[note]]
        kept = [index for index in range(len(table.header)) if index != note]
        parts, below = fitted(_columns(table, kept), width)
        return parts, [*below, *dict.fromkeys(lines)]

    groups: list[list[int]] = []
    for index in range(1, len(table.header)):
        fits = bool(groups) and least_width(_columns(table, [0, *groups[-1], index])) <= width
        groups = [*groups[:-1], [*groups[-1], index]] if fits else [*groups, [index]]
    return [_columns(table, [0, *group]) for group in groups], []


def widths(table: Table, width: int) -> list[int]:
    """Characters of each column: as wide as its cells, or narrower where lines can break between
    words, the widest first.
    """
    chosen = [max(map(len, column)) for column in _cells(table)]
    least = [_longest_word(column) for column in _cells(table)]
    while sum(chosen) + GAP * (len(chosen) - 1) + EDGES > width:
        room = [own - word for own, word in zip(chosen, least, strict=True)]
        if max(room) <= 0:
            break
        chosen[max(range(len(chosen)), key=lambda index: chosen[index] * (room[index] > 0))] -= 1
    return chosen


def least_width(table: Table) -> int:
    """Characters of ``table`` with a line break wherever there is a space."""
    words = [_longest_word(column) for column in _cells(table)]
    return sum(words) + GAP * (len(words) - 1) + EDGES


def _cells(table: Table) -> list[tuple[str, ...]]:
    """By column, the header among them."""
    return list(zip(table.header, *table.rows, strict=True))


def _longest_word(cells: tuple[str, ...]) -> int:
    return max((len(word) for cell in cells for word in cell.split(" ")), default=0)


def _columns(table: Table, kept: list[int]) -> Table:
    """Only these columns."""
    return replace(
        table,
        header=tuple(table.header[index] for index in kept),
        rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
        right=frozenset(place for place, index in enumerate(kept) if index in table.right),
    )
