"""Printing what ``rotq inspect`` found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from exporter.console.show import show_line, show_table
from exporter.reporting import summary
from exporter.reporting.summary import Table, human_bytes

if TYPE_CHECKING:
    from exporter.commands.inspect import Inspection

KERNELS_SHOWN = 12
"""Operators in the table unless -v asks for all."""


def show_inspection(console: Console, found: Inspection, *, every: bool) -> None:
    """Print the tables.

    Args:
        console: where.
        found: what to print.
        every: all linears and kernels, one by one.
    """
    where = f" for {found.backend}, target {found.target}," if found.backend else ""
    show_line(
        console,
        f"{summary.source_words(found.model)}: {found.model_type}, {found.parameters:,} parameters,"
        f" {found.what}{where} as {found.scheme}, float parts in"
        f" {found.dtype or 'an unknown dtype'}",
    )
    show_table(console, _schemes(found))
    for line in summary.kept_lines(found.kept):
        show_line(console, line)
    show_line(console, f"KV cache: {found.cache or 'float'}")
    show_table(console, summary.rotation_table(found))
    if not found.rotations:
        show_line(console, "rotations: none")
    if every:
        show_table(console, _linears(found))
    _show_fusion(console, found, None if every else KERNELS_SHOWN)
    show_table(console, _contents(found))
    show_line(
        console,
        f"total: {summary.size_words(found.bytes_before, found.nbytes)} (float checkpoint -> this)",
    )
    _show_state(console, found)


def _show_fusion(console: Console, found: Inspection, most: int | None) -> None:
    if found.fusion_note:
        show_line(console, f"kernels: unknown: {found.fusion_note}")
        return
    known = [linear for linear in found.linears if linear.fused is not None]
    if known:
        fused = sum(linear.fused is True for linear in known)
        show_line(console, f"{fused} of {len(known)} quantized linears run in integer kernels")
    for name in found.unfused[:most]:
        show_line(console, f"  dequantized on every run: {name}", "yellow")
    kernels = sorted(found.kernels.items(), key=lambda item: -item[1])
    rows = tuple((name, str(count)) for name, count in kernels[:most])
    show_table(
        console,
        Table("Operators in the runtime's own graph", ("operator", "count"), rows, frozenset({1})),
    )


def _show_state(console: Console, found: Inspection) -> None:
    for what, names in found.edited.items():
        show_line(console, f"{what} since the export: {', '.join(names)}", "bold red")
    if found.unreadable:
        show_line(console, f"cannot be read any further: {found.unreadable}", "bold red")
    if found.what == "exported" and not found.edited:
        show_line(console, f"checksums: all files are as exported; parity: {found.status}", "green")


def _schemes(found: Inspection) -> Table:
    rows = tuple((words, str(count)) for words, count in found.schemes.items())
    return Table("Quantized linears", ("how", "count"), rows, frozenset({1}))


def _linears(found: Inspection) -> Table:
    fused = {True: "integer kernel", False: "dequantized on every run", None: ""}
    rows = tuple(
        (linear.name, linear.scheme, linear.online_rotation or "", fused[linear.fused])
        for linear in found.linears
    )
    return Table("Linears", ("linear", "how", "online rotation", "runs as"), rows)


def _contents(found: Inspection) -> Table:
    rows = tuple(
        (
            part.kind,
            part.dtype,
            str(part.tensors),
            human_bytes(part.nbytes),
            f"{part.nbytes / max(1, found.nbytes):.1%}",
        )
        for part in found.contents
    )
    return Table(
        "Stored", ("kind", "dtype", "tensors", "size", "share"), rows, frozenset({2, 3, 4})
    )
