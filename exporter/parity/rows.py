"""The rows of the parity table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

from backends.base import DescribedModel, ProbedModel, RuntimeModel, StandIn
from exporter.reporting.report import ParityRow, Rung

if TYPE_CHECKING:
    from exporter.source import Source

NOT_FINITE = "not finite"
NO_ORIGINAL = "the original checkpoint is not at hand (-m/--model names it)"


def source_notes(source: Source) -> list[str]:
    """What a figure against the original does not show."""
    if source.quantized is None:
        return []
    return [f"the original is quantized ({source.quantized}): rotq's decoder reads it, unchecked"]


def row(
    rung: Rung,
    name: str,
    metric: str,
    measured: float,
    bound: float | None,
    note: str = "",
    runtime: str = "",
    not_run_in: str = "",
    session: Mapping[str, str] | None = None,
) -> ParityRow:
    """A figure, judged where it has a bound. One that is not finite fails it, and so does any where
    the bound is not."""
    finite = math.isfinite(measured) and (bound is None or math.isfinite(bound))
    return ParityRow(
        rung=rung,
        name=name,
        metric=metric,
        measured=measured if math.isfinite(measured) else None,
        bound=bound if bound is None or math.isfinite(bound) else None,
        passed=None if bound is None else finite and measured <= bound,
        note=note if finite else NOT_FINITE,
        runtime=runtime,
        not_run_in=not_run_in,
        session=dict(session or {}),
    )


class Ran(TypedDict):
    """What ran a figure, as :func:`row` takes it."""

    runtime: str
    not_run_in: str
    session: Mapping[str, str]


def ran(running: RuntimeModel | ProbedModel) -> Ran:
    """What ``running`` says of itself, and of its session where it was asked."""
    return {
        "runtime": getattr(running, "runtime", ""),  # what is probed need not say
        "not_run_in": running.not_run_in if isinstance(running, StandIn) else "",
        "session": running.session if isinstance(running, DescribedModel) else {},
    }


def not_run(rung: Rung, name: str, metric: str, reason: str) -> ParityRow:
    """A figure that could not be had here."""
    return ParityRow(
        rung=rung,
        name=name,
        metric=metric,
        measured=None,
        bound=None,
        passed=None,
        note=f"not run: {reason}",
    )
