"""Charts of how rotations were chosen: the gates, and training."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.reporting.charts.style import AFTER, BEFORE, MUTED, Chart, figure, logarithmic
from exporter.reporting.report import GateRow, RotationGateRow, TrainingSummary

_ROW = 0.32
"""Inches of one bar."""


def gate_chart(rows: Sequence[GateRow]) -> Chart | None:
    """KL of every candidate that was tried, with the interval of its distance from the lowest."""
    tried = [row for row in rows if row.kl is not None]
    if not tried:
        return None
    lowest = min(row.kl for row in tried if row.kl is not None)
    with figure("gate", "KL of every candidate of the gate", 0.9 + _ROW * len(tried)) as (
        chart,
        (axes,),
    ):
        for index, row in enumerate(tried):
            assert row.kl is not None
            axes.barh(index, row.kl, color=AFTER if row.chosen else MUTED, height=0.6)
            if row.margin and row.margin_low is not None and row.margin_high is not None:
                ends = [max(0.0, lowest + row.margin_low), lowest + row.margin_high]
                axes.plot(ends, [index, index], color=BEFORE, marker="|", lw=1.5)
        names = [f"{row.name}{'  (chosen)' if row.chosen else ''}" for row in tried]
        axes.set_yticks(range(len(tried)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("KL to the float model, nats per token (line: 95 % interval)")
    return chart


def rotation_gate_chart(rows: Sequence[RotationGateRow]) -> Chart | None:
    """The quantization error that every candidate of every rotation leaves; a dot for a layer."""
    if not rows:
        return None
    with figure(
        "rotations", "Quantization error of the candidates of each rotation", 0.9 + _ROW * len(rows)
    ) as (chart, (axes,)):
        for index, row in enumerate(rows):
            axes.barh(index, row.error, color=AFTER if row.chosen else MUTED, height=0.6)
            axes.plot(row.layers, [index] * len(row.layers), ls="", marker=".", color=BEFORE, ms=4)
        names = [
            f"{row.rotation} {row.candidate}{'  (chosen)' if row.chosen else ''}" for row in rows
        ]
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        errors = [error for row in rows for error in (row.error, *row.layers) if error > 0]
        if errors and max(errors) > 30 * min(errors):
            logarithmic(axes, "x", errors)
        axes.set_xlabel("relative squared quantization error (dots: layers)")
    return chart


def training_chart(curves: Sequence[TrainingSummary]) -> Chart | None:
    """Loss by step, and held-out error by epoch, of every rotation that was trained."""
    shown = [curve for curve in curves if len(curve.losses) > 1]
    if not shown:
        return None
    with figure(
        "training",
        "Training of rotations: loss and held-out error",
        2.4 * len(shown),
        columns=2,
        rows=len(shown),
    ) as (chart, axes):
        for curve, (left, right) in zip(
            shown, zip(axes[::2], axes[1::2], strict=True), strict=True
        ):
            left.plot(curve.losses[:-1], color=AFTER, label="before each step")
            last = len(curve.losses) - 1
            left.plot([last], curve.losses[-1:], color=BEFORE, marker="o", ls="", label="result")
            left.set_title(f"{curve.rotation}: {curve.objective}", loc="left")
            left.set_xlabel("step")
            left.set_ylabel("loss")

            if curve.held_out_errors:
                right.plot(curve.held_out_errors, color=BEFORE, marker=".")
            else:
                right.text(0.5, 0.5, "not measured", ha="center", transform=right.transAxes)
            right.set_title(f"{curve.rotation}: held out", loc="left")
            right.set_xlabel("epoch")
            right.set_ylabel("relative squared error")
        axes[0].legend()
    return chart
