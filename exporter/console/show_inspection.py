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


def show_inspection(console: Console, inspection: Inspection, *, every: bool) -> None:
    """Print the tables.

    Args:
        console: where.
        inspection: what to print.
        every: all linears and kernels, one by one.
    """
    where = f" for {inspection.backend}, target {inspection.target}," if inspection.backend else ""
    show_line(
        console,
        f"{summary.source_words(inspection.model)}: {inspection.model_type},"
        f" {inspection.parameters:,} parameters, {inspection.what}{where} as {inspection.scheme},"
        f" float parts in {inspection.dtype or 'an unknown dtype'}",
    )

    show_table(console, _schemes(inspection))
    for line in summary.kept_lines(inspection.kept):
        show_line(console, line)
    show_line(console, f"KV cache: {inspection.cache or 'float'}")
    show_table(console, summary.rotation_table(inspection))
    if not inspection.rotations:
        show_line(console, "rotations: none")
    if every:
        show_table(console, _linears(inspection))

    _show_fusion(console, inspection, None if every else KERNELS_SHOWN)
    show_table(console, _contents(inspection))
    size = summary.size_words(inspection.bytes_before, inspection.nbytes)
    show_line(console, f"total: {size} (float checkpoint -> this)")
    _show_state(console, inspection)


def _show_fusion(console: Console, inspection: Inspection, most: int | None) -> None:
    if inspection.fusion_note:
        show_line(console, f"kernels: unknown: {inspection.fusion_note}")
        return
    known = [linear for linear in inspection.linears if linear.fused is not None]
    if known:
        fused = sum(linear.fused is True for linear in known)
        show_line(console, f"{fused} of {len(known)} quantized linears run in integer kernels")
    for name in inspection.unfused[:most]:
        show_line(console, f"  dequantized on every run: {name}", "yellow")
    kernels = sorted(inspection.kernels.items(), key=lambda item: -item[1])
    rows = tuple((name, str(count)) for name, count in kernels[:most])
    show_table(
        console,
        Table("Operators in the runtime's own graph", ("operator", "count"), rows, frozenset({1})),
    )


def _show_state(console: Console, inspection: Inspection) -> None:
    for what, names in inspection.edited.items():
        show_line(console, f"{what} since the export: {', '.join(names)}", "bold red")
    if inspection.unreadable:
        show_line(console, f"cannot be read any further: {inspection.unreadable}", "bold red")
    if inspection.export_sha256 is not None and not inspection.edited:
        show_line(console, summary.digest_line(inspection.export_sha256))
        show_line(
            console, f"checksums: all files are as exported; parity: {inspection.status}", "green"
        )


def _schemes(inspection: Inspection) -> Table:
    rows = tuple((words, str(count)) for words, count in inspection.schemes.items())
    return Table("Quantized linears", ("how", "count"), rows, frozenset({1}))


def _linears(inspection: Inspection) -> Table:
    fused = {True: "integer kernel", False: "dequantized on every run", None: ""}
    rows = tuple(
        (linear.name, linear.scheme, linear.online_rotation or "", fused[linear.fused])
        for linear in inspection.linears
    )
    return Table("Linears", ("linear", "how", "online rotation", "runs as"), rows)


def _contents(inspection: Inspection) -> Table:
    rows = tuple(
        (
            part.kind,
            part.dtype,
            str(part.tensors),
            human_bytes(part.nbytes),
            f"{part.nbytes / max(1, inspection.nbytes):.1%}",
        )
        for part in inspection.contents
    )
    return Table(
        "Stored", ("kind", "dtype", "tensors", "size", "share"), rows, frozenset({2, 3, 4})
    )
