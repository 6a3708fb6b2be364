"""The rungs, one after the other."""

from __future__ import annotations

from collections.abc import Callable

from calib.progress import Progress, track
from exporter.parity.fold import fold_row
from exporter.parity.overflow import overflow_rows
from exporter.parity.quality import quality_rows
from exporter.parity.rounding import rounding_rows
from exporter.parity.runtime import runtime_rows
from exporter.parity.stored import stored_rows
from exporter.parity.subject import Sessions, Subject
from exporter.reporting.report import ParityRow


def check_parity(subject: Subject, progress: Progress) -> list[ParityRow]:
    """Run all rungs and judge them.

    Returns:
        One row for each figure, in the order of the rungs. What cannot be run is there with the
        reason.
    """
    sessions = Sessions(subject.backend, subject.target, subject.folder)
    rungs: list[Callable[[], list[ParityRow]]] = [
        lambda: [*stored_rows(subject), *rounding_rows(subject)],
        lambda: [fold_row(subject)],
        lambda: runtime_rows(subject, sessions),
        lambda: quality_rows(subject, sessions),
    ]
    rows: list[ParityRow] = []
    for rung in track(rungs, "parity", len(rungs), progress):
        rows += rung()
    return rows + overflow_rows(subject, rows)
