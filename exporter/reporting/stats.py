"""What ``rotq stats`` found, as data: the content of ``stats.json`` and ``stats.csv``."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from exporter.reporting.evidence import Frozen
from exporter.reporting.report import (
    CalibrationSummary,
    ModelSummary,
    RotationGateRow,
    RotationSummary,
)

STATS_FILE = "stats.json"
TABLE_FILE = "stats.csv"
STATS_FORMAT_VERSION = 1


class TensorFigures(Frozen):
    """The input, the output or the weight of one linear, all channels together."""

    absmax: float
    std: float
    kurtosis: float
    """3 for a normal distribution; 0 for a constant tensor."""
    outliers: float
    """Share of the values whose magnitude is above 6 standard deviations, 0 to 1."""
    peak: float | None
    """Largest magnitude of a channel over that of the median channel; none where the median channel
    is dead.
    """


class PhaseFigures(Frozen):
    """One linear, before or after rotation."""

    damage: float
    """Relative squared error of the output."""
    input_error: float
    """Relative squared error of the input; 0 where the scheme leaves inputs in float."""
    weight_error: float
    """Relative squared error of the weight, rounded to nearest."""
    input: TensorFigures
    output: TensorFigures
    weight: TensorFigures


class LinearRow(Frozen):
    """One linear."""

    linear: str
    reads: str
    """The space of its input: ``residual``, ``value`` or ``ffn``."""
    in_features: int
    out_features: int
    before: PhaseFigures
    after: PhaseFigures | None
    """``None`` where nothing is rotated."""

    @property
    def damage(self) -> float:
        """What the rows are sorted by: after rotation where there is one, else before."""
        return (self.after or self.before).damage


class ClusterSummary(Frozen):
    """How input channels were clustered."""

    clusters: int
    jointly: bool
    warning: str


class StatsReport(Frozen):
    """The content of ``stats.json``."""

    format_version: int = STATS_FORMAT_VERSION
    model: ModelSummary
    scheme: str
    rotate: str
    clusters: ClusterSummary | None
    calibration: CalibrationSummary
    rotations: list[RotationSummary]
    rotation_gate: list[RotationGateRow]
    linears: list[LinearRow]
    """The most damaged first."""
    seconds: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write ``stats.json`` and ``stats.csv`` into ``folder``."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False)
        (folder / STATS_FILE).write_text(text + "\n", encoding="utf-8")
        rows = [_flat(row.model_dump(mode="json")) for row in self.linears]
        with (folder / TABLE_FILE).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures as the columns of a table: ``after_input_kurtosis``."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}_")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
