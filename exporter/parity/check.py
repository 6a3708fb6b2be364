"""The three rungs, one after the other."""

from __future__ import annotations

from calib.progress import Progress
from exporter.parity.fold import fold_row
from exporter.parity.overflow import overflow_rows
from exporter.parity.quality import quality_rows
from exporter.parity.runtime import runtime_rows
from exporter.parity.subject import Sessions, Subject
from exporter.reporting.report import ParityRow

_RUNGS = 3


def check_parity(subject: Subject, progress: Progress) -> list[ParityRow]:
    """Run all three rungs and judge them.

    Returns:
        One row for each figure, in the order of the rungs. What cannot be run is there with the
        reason.
    """
    sessions = Sessions(subject.backend, subject.target, subject.folder)
    progress("parity", 0, _RUNGS)
    rows = [fold_row(subject)]
    progress("parity", 1, _RUNGS)
    rows += runtime_rows(subject, sessions)
    progress("parity", 2, _RUNGS)
    rows += quality_rows(subject, sessions)
    progress("parity", 3, _RUNGS)
    return rows + overflow_rows(subject, rows)
