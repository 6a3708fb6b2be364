"""``rotq export --retry``: an export, and where its parity fails the remedies that it names, one
after the other, until one holds every bound.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calib.errors import RotqError
from calib.process.progress import Progress, silent
from exporter.commands.export import NotAcceptedError, export
from exporter.flags import command, flags_of
from exporter.output import claimed
from exporter.recipe import Recipe, with_values
from exporter.reporting.report import Remedy, Report
from exporter.run.options import RunOptions, check_retry
from exporter.run.reservation import check_paths
from exporter.run.results import ExportResult
from exporter.run.workdir import CAPTURE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_RECAPTURED = ("calibration", "evaluation", "prefix", "dtype", "rotation")
"""Settings that statistics depend on, or which rows they are of: keys, and beginnings of keys."""


def export_until_passed(
    recipe: Recipe,
    options: RunOptions,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = silent,
) -> ExportResult:
    """Export, and try remedies from cheap to dear; arguments and errors as for
    :func:`exporter.commands.export.export`.

    Every attempt replaces what ``options.output`` holds if it passes, and nothing otherwise. What
    was captured for the first serves all that depend on it.

    Returns:
        The first export that passed; where none did, the first of all.
    """
    check_retry(verify=options.verify, from_artifact=options.from_artifact)
    check_paths(recipe, options)
    with _shared_capture(options) as shared:
        own = options.work_dir or options.from_capture  # one of them keeps the statistics already
        first = export(
            recipe,
            options if own else replace(options, shared_capture=shared),
            model=model,
            tokenizer=tokenizer,
            progress=progress,
        )
        failed = [report for report in first.reports.values() if report.status == "failed"]
        if not failed:
            return first

        for remedy in failed[0].remedies:
            same = shared.is_dir() and _same_statistics(remedy)
            again = replace(
                options,
                overwrite=True,
                work_dir=None,
                resume=False,
                from_capture=None,
                shared_capture=shared if same else None,
                profile=None,  # that of the first attempt stays
            )
            logger.warning("parity failed; trying %s", command(*flags_of(remedy.change)) or "again")
            try:
                return export(
                    with_values(recipe, remedy.change),
                    again,
                    model=model,
                    tokenizer=tokenizer,
                    progress=progress,
                    accept=_none_failed,
                )
            except NotAcceptedError:
                continue
            except RotqError as error:
                logger.warning("that cannot be had: %s", error.message)
    logger.warning("no remedy held every bound: '%s' is the first attempt", options.output)
    return first


@contextmanager
def _shared_capture(options: RunOptions) -> Iterator[Path]:
    """Where the statistics of all attempts are: given, in the work folder, or in a folder beside
    the output that vanishes with the block.
    """
    if options.from_capture is not None:
        yield options.from_capture
    elif options.work_dir is not None:
        yield options.work_dir / CAPTURE
    else:
        beside = options.output.with_name(f".{options.output.name}.retry")
        with claimed(beside) as claim, claim.scratch("statistics") as folder:
            yield folder / CAPTURE


def _none_failed(reports: Mapping[str, Report]) -> bool:
    return all(report.status != "failed" for report in reports.values())


def _same_statistics(remedy: Remedy) -> bool:
    return not any(key.partition(".")[0] in _RECAPTURED for key in remedy.change)
