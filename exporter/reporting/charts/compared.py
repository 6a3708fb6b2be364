"""The chart of ``rotq eval`` with several sources: quality against size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.reporting.charts.style import AFTER, BEFORE, Chart, figure

_MIB = 2**20
_ROW = 0.34


@dataclass(frozen=True)
class Point:
    """One source."""

    name: str
    perplexity: float
    nbytes: int | None


def compared_chart(points: Sequence[Point]) -> Chart:
    """Perplexity against bytes where all sizes are known; else a bar for each."""
    words = "Perplexity of every source"
    sizes = [point.nbytes / _MIB for point in points if point.nbytes is not None]
    if len(sizes) == len(points) > 1 and len(set(sizes)) > 1:
        with figure("compared", f"{words} against its size", 3.6) as (chart, (axes,)):
            values = [point.perplexity for point in points]
            axes.plot(sizes, values, color=AFTER, marker="o", ls="")
            for point, size in zip(points, sizes, strict=True):
                place = (size, point.perplexity)
                axes.annotate(
                    point.name, place, xytext=(6, 4), textcoords="offset points", fontsize=8
                )
            axes.margins(x=0.25, y=0.15)
            axes.set_xlabel("MiB of weights")
            axes.set_ylabel("perplexity")
        return chart
    with figure("compared", words, 0.9 + _ROW * len(points)) as (chart, (axes,)):
        axes.barh(range(len(points)), [point.perplexity for point in points], color=AFTER)
        axes.set_yticks(range(len(points)), [point.name for point in points])
        axes.invert_yaxis()
        axes.axvline(min(point.perplexity for point in points), color=BEFORE, lw=0.8, ls=":")
        axes.set_xlabel("perplexity (dotted: the lowest)")
    return chart
