"""Tables of :mod:`exporter.reporting.summary` as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from exporter.reporting.summary import Table


def page(title: str, facts: Mapping[str, object], tables: Iterable[Table] = ()) -> str:
    """A title, names and values, and tables, as a fragment of HTML."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    parts = [f"<p><b>{escape(title)}</b></p>", f"<table>{rows}</table>"]
    return "".join([*parts, *map(_table, tables)])


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{'<b>' * marked}{escape(cell)}{'</b>' * marked}</td>"
            for marked in [index in table.marked]
            for cell in row
        )
        + "</tr>"
        for index, row in enumerate(table.rows)
    )
    return f"<p>{escape(table.title)}</p><table><tr>{head}</tr>{body}</table>"
