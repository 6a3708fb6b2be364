"""The rows of the parity table."""

from __future__ import annotations

import math
from typing import Literal

from exporter.reporting.report import ParityRow

NO_ORIGINAL = "the original checkpoint is not at hand (-m/--model names it)"


def row(
    rung: Literal[1, 2, 3],
    name: str,
    metric: str,
    measured: float,
    bound: float | None,
    note: str = "",
    runtime: str = "",
) -> ParityRow:
    """A figure, judged where it has a bound. One that is not finite fails it."""
    finite = math.isfinite(measured)
    return ParityRow(
        rung=rung,
        name=name,
        metric=metric,
        measured=measured if finite else None,
        bound=bound,
        passed=None if bound is None else finite and measured <= bound,
        note=note if finite else "not finite",
        runtime=runtime,
    )


def not_run(rung: Literal[1, 2, 3], name: str, metric: str, reason: str) -> ParityRow:
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
