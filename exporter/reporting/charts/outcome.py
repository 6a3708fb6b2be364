"""Charts of the result: where the bytes went, and how far every figure is from its bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from exporter.reporting.charts.style import AFTER, BAD, MUTED, PALETTE, Chart, figure, logarithmic
from exporter.reporting.report import ParityRow

_MIB = 2**20
_LEAST = 1e-3
"""Shares of a bound below this are drawn as this."""


def bytes_chart(before: int, parts: Mapping[str, int]) -> Chart | None:
    """The weights of the checkpoint against those of the export, by what they are.

    Args:
        before: bytes of the source weights.
        parts: bytes that are stored, by what they are.
    """
    if not parts:
        return None
    with figure("bytes", "Bytes before and after, by what they are", 1.9) as (chart, (axes,)):
        axes.barh(0, before / _MIB, color=MUTED, height=0.6, label="source weights")
        left = 0.0
        for index, (name, size) in enumerate(parts.items()):
            color = PALETTE[index % len(PALETTE)]
            axes.barh(1, size / _MIB, left=left, color=color, height=0.6, label=name)
            left += size / _MIB
        axes.set_yticks([0, 1], ["before", "after"])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("MiB")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=8)
    return chart


def parity_chart(rows: Sequence[ParityRow]) -> Chart | None:
    """Every judged figure as a share of its bound; one whose bound is zero as held or missed."""
    judged = [row for row in rows if row.passed is not None]
    if not judged:
        return None
    with figure(
        "parity", "Every judged parity figure as a share of its bound", 0.9 + 0.27 * len(judged)
    ) as (chart, (axes,)):
        for index, row in enumerate(judged):
            share = _share(row)
            color = AFTER if row.passed else BAD
            axes.barh(index, share, color=color, height=0.6)
            axes.plot([share], [index], color=color, marker="o", ms=3, clip_on=False)
            if not row.passed:
                axes.text(share, index, " MISSED", va="center", color=BAD, fontsize=8)
        axes.axvline(1.0, color=BAD, lw=1.0, ls="--")
        axes.set_yticks(range(len(judged)), [_name(row) for row in judged], fontsize=7)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        logarithmic(axes, "x", [1.0])
        axes.set_xlim(left=_LEAST)
        axes.margins(y=0.02)
        axes.set_xlabel("measured over bound (dashed: the bound)")
    return chart


def _share(row: ParityRow) -> float:
    if row.measured is None or row.bound is None:
        return 10.0  # it could not be finite, and failed
    if row.bound == 0:
        return _LEAST if row.passed else 10.0
    if row.metric == "perplexity ratio" and row.measured > 0 and row.bound > 1:  # 1: nothing lost
        return max(_LEAST, math.log(row.measured) / math.log(row.bound))
    return max(_LEAST, abs(row.measured) / abs(row.bound))


def _name(row: ParityRow) -> str:
    name = row.name.removeprefix("end to end: ")
    text = f"{row.rung} {name}: {row.metric}"
    return text if len(text) <= 62 else f"{text[:59]}..."
