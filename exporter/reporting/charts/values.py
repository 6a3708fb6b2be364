"""Charts of the values inside the model: inputs before and after rotation, noise by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from exporter.reporting.charts.style import AFTER, BEFORE, PALETTE, Chart, figure, logarithmic
from exporter.reporting.evidence import (
    BINS,
    HIGHEST_LOG2,
    LOWEST_LOG2,
    InputFigures,
    NoiseFigure,
    Spread,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEP = (HIGHEST_LOG2 - LOWEST_LOG2) / BINS
_EDGES = tuple(LOWEST_LOG2 + _STEP * index for index in range(BINS + 1))
_MARKS = "os^Dvx+*"
_SIDES = ((BEFORE, "original"), (AFTER, "rotated"))


def spread_chart(inputs: Sequence[InputFigures]) -> Chart | None:
    """How far the largest token is from the median one, layer by layer, for each kind of input."""
    kinds = list(dict.fromkeys(row.kind for row in inputs))
    if not kinds:
        return None
    words = "Largest over median token of every input, by layer"
    with _panels("spread", words, kinds) as (chart, axes):
        for kind, at in zip(kinds, axes, strict=True):
            own = [row for row in inputs if row.kind == kind]
            before = [(row.layer, row.original.token_ratio) for row in own if row.original]
            after = [(row.layer, row.rotated.token_ratio) for row in own]
            for points, (color, name), mark in zip((before, after), _SIDES, "os", strict=True):
                if points:
                    layers, ratios = zip(*points, strict=True)
                    at.plot(layers, ratios, color=color, marker=mark, ms=3, label=name)
            logarithmic(at, "y", (ratio for _, ratio in (*before, *after)), base=2)
            at.set_xlabel("layer")
        axes[0].legend()
        chart.drawing.supylabel("largest token over median token", fontsize=9)
    return chart


def histogram_chart(inputs: Sequence[InputFigures]) -> Chart | None:
    """Magnitudes of the values at the input of each kind that is hardest to quantize."""
    shown = [row for row in inputs if any(row.rotated.histogram or ())]
    if not shown:
        return None
    words = "Histograms of inputs before and after rotation"
    with _panels("histograms", words, map(_title, shown)) as (chart, axes):
        for row, at in zip(shown, axes, strict=True):
            filled: list[int] = []
            for spread, color, name in _spreads(row):
                counts = spread.histogram or []
                shares = [count / sum(counts) for count in counts]
                at.stairs(shares, _EDGES, color=color, label=name, lw=1.3)
                filled += [index for index, count in enumerate(counts) if count]
                at.axvline(_EDGES[filled[-1] + 1], color=color, lw=0.8, ls=":")
            logarithmic(at, "y", [1.0])
            at.set_xlim(_EDGES[min(filled)], _EDGES[max(filled) + 1] + _STEP)
            at.set_xlabel("log2 |x|: one unit is one bit of range")
        axes[0].legend(loc="upper left")
        chart.drawing.supylabel("share of values (dotted: the largest)", fontsize=9)
    return chart


def channel_chart(inputs: Sequence[InputFigures]) -> Chart | None:
    """The largest magnitude of every channel of the same inputs."""
    shown = [row for row in inputs if row.rotated.channels and any(row.rotated.histogram or ())]
    if not shown:
        return None
    words = "Largest magnitude of every channel before and after rotation"
    with _panels("channels", words, map(_title, shown)) as (chart, axes):
        for row, at in zip(shown, axes, strict=True):
            for spread, color, name in _spreads(row):
                at.plot(spread.channels, color=color, label=name, lw=1.0)
            logarithmic(at, "y", row.rotated.channels, base=2)
            at.set_xlabel("channel")
        axes[0].legend()
        chart.drawing.supylabel("largest magnitude", fontsize=9)
    return chart


@contextmanager
def _panels(name: str, words: str, titles: Iterable[str]) -> Iterator[tuple[Chart, list[Axes]]]:
    """Two small charts in a row, as many rows as it takes, each with its title."""
    named = list(titles)
    rows = -(-len(named) // 2)
    with figure(name, words, 2.0 * rows + 0.3, columns=2, rows=rows) as (chart, axes):
        for title, at in zip(named, axes, strict=False):
            at.set_title(title, loc="left")
        for at in axes[len(named) :]:
            at.set_visible(False)
        yield chart, axes[: len(named)]


def _title(row: InputFigures) -> str:
    return f"layer {row.layer}: {row.kind}"


def _spreads(row: InputFigures) -> Iterator[tuple[Spread, str, str]]:
    """Those whose values were kept, with colour and name."""
    for spread, (color, name) in zip((row.original, row.rotated), _SIDES, strict=True):
        if spread is not None and any(spread.histogram or ()):
            yield spread, color, name


def noise_chart(rows: Sequence[NoiseFigure]) -> Chart | None:
    """What quantization does to every linear by itself, layer by layer."""
    inside = [row for row in rows if row.layer >= 0]
    if not inside:
        return None

    kinds = list(dict.fromkeys(row.kind for row in inside))
    with figure("noise", "Noise of every quantized linear by layer", 3.2) as (chart, (axes,)):
        for index, kind in enumerate(kinds):
            own = sorted((row.layer, row.noise) for row in inside if row.kind == kind)
            layers, noise = zip(*own, strict=True)
            axes.plot(
                layers,
                noise,
                color=PALETTE[index % len(PALETTE)],
                marker=_MARKS[index % len(_MARKS)],
                ms=4,
                lw=0.8,
                label=kind,
            )
        if min(row.noise for row in inside) > 0:
            logarithmic(axes, "y", [1.0])
        axes.set_xlabel("layer")
        axes.set_ylabel("relative L2 of the output")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return chart
