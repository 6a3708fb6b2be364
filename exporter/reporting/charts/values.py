"""Charts of the values inside the model: inputs before and after rotation, noise by layer."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.reporting.charts.style import AFTER, BEFORE, PALETTE, Chart, figure, plain_numbers
from exporter.reporting.report import InputFigures, NoiseFigure

_LOW, _HIGH = -20.0, 20.0
"""Ends of the histograms, log2: as :class:`exporter.reporting.report.Spread` has them."""
_MARKS = "os^Dvx+*"


def spread_chart(inputs: Sequence[InputFigures]) -> Chart | None:
    """How far the largest token is from the median one, layer by layer, for each kind of input."""
    kinds = list(dict.fromkeys(row.kind for row in inputs))
    if not kinds:
        return None
    rows = -(-len(kinds) // 2)
    with figure(
        "spread",
        "Largest over median token of every input, by layer",
        2.0 * rows + 0.3,
        columns=2,
        rows=rows,
    ) as (chart, axes):
        for kind, at in zip(kinds, axes, strict=False):
            own = [row for row in inputs if row.kind == kind]
            before = [(row.layer, row.original.token_ratio) for row in own if row.original]
            after = [(row.layer, row.rotated.token_ratio) for row in own]
            for points, color, words, mark in (
                (before, BEFORE, "original", "o"),
                (after, AFTER, "rotated", "s"),
            ):
                if points:
                    layers, ratios = zip(*points, strict=True)
                    at.plot(layers, ratios, color=color, marker=mark, ms=3, label=words)
            at.set_yscale("log", base=2)
            plain_numbers(at.yaxis)
            at.set_title(kind, loc="left")
            at.set_xlabel("layer")
        for at in axes[len(kinds) :]:
            at.set_visible(False)
        axes[0].legend()
        chart.drawing.supylabel("largest token over median token", fontsize=9)
    return chart


def histogram_chart(inputs: Sequence[InputFigures]) -> Chart | None:
    """Magnitudes of the values at the input of each kind that is hardest to quantize."""
    shown = [row for row in inputs if row.rotated.histogram]
    if not shown:
        return None
    rows = -(-len(shown) // 2)
    with figure(
        "histograms",
        "Histograms of inputs before and after rotation",
        2.0 * rows + 0.3,
        columns=2,
        rows=rows,
    ) as (chart, axes):
        for row, at in zip(shown, axes, strict=False):
            for spread, color, words in (
                (row.original, BEFORE, "original"),
                (row.rotated, AFTER, "rotated"),
            ):
                if spread is None or not spread.histogram:
                    continue
                step = (_HIGH - _LOW) / len(spread.histogram)
                edges = [_LOW + step * index for index in range(len(spread.histogram) + 1)]
                shares = [count / sum(spread.histogram) for count in spread.histogram]
                at.stairs(shares, edges, color=color, label=words, lw=1.3)
                top = max(index for index, count in enumerate(spread.histogram) if count)
                at.axvline(edges[top + 1], color=color, lw=0.8, ls=":")
            at.set_yscale("log")
            filled = [
                index
                for spread in (row.original, row.rotated)
                if spread is not None
                for index, count in enumerate(spread.histogram)
                if count
            ]
            if filled:
                step = (_HIGH - _LOW) / len(row.rotated.histogram)
                at.set_xlim(max(_LOW, _LOW + step * min(filled)), _LOW + step * (max(filled) + 2))
            at.set_title(f"layer {row.layer}: {row.kind}", loc="left")
            at.set_xlabel("log2 |x|: one unit is one bit of range")
        for at in axes[len(shown) :]:
            at.set_visible(False)
        axes[0].legend(loc="upper left")
        chart.drawing.supylabel("share of values (dotted: the largest)", fontsize=9)
    return chart


def channel_chart(inputs: Sequence[InputFigures]) -> Chart | None:
    """The largest magnitude of every channel of the same inputs."""
    shown = [row for row in inputs if row.rotated.channels]
    if not shown:
        return None
    rows = -(-len(shown) // 2)
    with figure(
        "channels",
        "Largest magnitude of every channel before and after rotation",
        2.0 * rows + 0.3,
        columns=2,
        rows=rows,
    ) as (chart, axes):
        for row, at in zip(shown, axes, strict=False):
            for spread, color, words in (
                (row.original, BEFORE, "original"),
                (row.rotated, AFTER, "rotated"),
            ):
                if spread is not None and spread.channels:
                    at.plot(spread.channels, color=color, label=words, lw=1.0)
            at.set_yscale("log", base=2)
            plain_numbers(at.yaxis)
            at.set_title(f"layer {row.layer}: {row.kind}", loc="left")
            at.set_xlabel("channel")
        for at in axes[len(shown) :]:
            at.set_visible(False)
        axes[0].legend()
        chart.drawing.supylabel("largest magnitude", fontsize=9)
    return chart


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
            axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.set_ylabel("relative L2 of the output")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return chart
