"""Why figures are not finite: an activation that the target's dtype cannot hold."""

from __future__ import annotations

from collections.abc import Sequence

from calib.measure.overflow import first_overflow
from calib.measure.reference import build_reference
from exporter.parity.rows import NOT_FINITE, row
from exporter.parity.subject import Subject
from exporter.reporting.report import ParityRow


def overflow_rows(subject: Subject, rows: Sequence[ParityRow]) -> list[ParityRow]:
    """The activation that made figures of ``rows`` not finite, which fails; none where all are."""
    if not subject.short or all(NOT_FINITE not in found.note for found in rows):
        return []
    reference = build_reference(subject.quantized)
    found = first_overflow(reference, subject.rows, subject.quantized.dtype)
    if found is None:
        return []
    note = f"{found}: --dtype bfloat16 or float32 holds it"
    name = f"largest activation in {subject.dtype_name}"
    return [row(2, name, "share of the range", found.share, 1.0, note)]
