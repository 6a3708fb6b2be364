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
    return "".join([*parts, *map(table_html, tables)])


def table_html(table: Table) -> str:
    """A table under its title; empty where it has no rows."""
    if not table.rows:
        return ""
    kinds = [' class="number"' if at in table.right else "" for at in range(len(table.header))]
    head = "".join(
        f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, table.header, strict=True)
    )
    body = "".join(
        ("<tr class='marked'>" if index in table.marked else "<tr>")
        + "".join(
            f"<td{kind}>{'<b>' * marked}{escape(cell)}{'</b>' * marked}</td>"
            for marked in [index in table.marked]
            for kind, cell in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for index, row in enumerate(table.rows)
    )
    return f"<h3>{escape(table.title)}</h3><table><tr>{head}</tr>{body}</table>"
