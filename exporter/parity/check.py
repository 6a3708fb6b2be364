"""The rungs, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from calib.process.memory import give_back
from calib.process.progress import Progress, track
from exporter.parity.fold import fold_rows
from exporter.parity.metadata import metadata_rows
from exporter.parity.overflow import overflow_rows
from exporter.parity.planned import planned_rows
from exporter.parity.quality import quality_rows
from exporter.parity.rounding import float_rows, rounding_rows
from exporter.parity.runtime import runtime_rows
from exporter.parity.shared_inputs import shared_input_rows
from exporter.parity.stored import Stored, stored_rows
from exporter.parity.subject import Sessions, Subject
from exporter.reporting.report import ParityRow

Check = Callable[[], list[ParityRow]]


def _anew(rung: str, check: Check) -> list[ParityRow]:
    return check()


def check_parity(
    subject: Subject, progress: Progress, remember: Callable[[str, Check], list[ParityRow]] = _anew
) -> list[ParityRow]:
    """Run all rungs and judge them.

    Args:
        subject: what is compared.
        progress: called after every rung.
        remember: gives the rows of a rung: some that were kept, or what checking it now gives.

    Returns:
        One row for each figure, in the order of the rungs. What cannot be run is there with the
        reason.
    """
    sessions = Sessions(subject.backend, subject.target, subject.folder)
    rungs: Mapping[str, Check] = {
        "files": lambda: _files(subject),
        "fold": lambda: fold_rows(subject),
        "runtime": lambda: runtime_rows(subject, sessions),
        "quality": lambda: quality_rows(subject, sessions),
    }
    rows: list[ParityRow] = []
    for rung, check in track(rungs.items(), "parity", len(rungs), progress):
        rows += remember(rung, check)
        give_back(subject.nbytes)
    return rows + overflow_rows(subject, rows)


def _files(subject: Subject) -> list[ParityRow]:
    stored = Stored.read(subject.backend, subject.folder, subject.target)
    return [
        *stored_rows(subject, stored),
        *planned_rows(subject, stored),
        *shared_input_rows(subject),
        *metadata_rows(subject),
        *float_rows(subject, stored),
        *rounding_rows(subject),
    ]
