"""``rotq stats``: statistics of every decoder linear before and after rotation, and what the scheme
does to each.

``before`` is the model with its norms folded into the linears and nothing rotated, ``after`` the
same with rotations folded in and, for R3 and R4, running online. The original itself would mix the
norms' gains into what rotations do.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor

from calib.architectures import LinearSpec
from calib.data.batches import length_batches
from calib.data.tokens import token_hash
from calib.fusing import FusedModel, materialize
from calib.progress import Progress, silent
from calib.rotations.from_capture import TrainedRotations
from calib.rotations.rotation_set import RotationSet
from calib.schemes import LinearScheme, PerCluster
from calib.stats.clusters import NO_FUSED_KERNEL, cluster_linears
from calib.stats.damage import LinearDamage, linear_damage
from calib.stats.linears import LinearMoments, linear_moments
from calib.stats.moments import MomentStatistics
from exporter.commands.export import Run
from exporter.output import atomic_folder
from exporter.output import check_target as check_output
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.describe import package_versions
from exporter.reporting.report import (
    CalibrationSummary,
    ModelSummary,
    RotationGateRow,
    RotationSummary,
)
from exporter.run.options import RunOptions
from exporter.run.rotations import candidate_sets, kinds_of, rotation_summaries

STATS_FILE = "stats.json"
TABLE_FILE = "stats.csv"
TENSORS_FILE = "stats.safetensors"
STATS_FORMAT_VERSION = 1

logger = logging.getLogger(__name__)

_PARTS = ("input", "output", "weight_in", "weight_out")
_CHANNELS = {
    "min": "minimum",
    "max": "maximum",
    "mean": "mean",
    "std": "std",
    "skewness": "skewness",
    "kurtosis": "kurtosis",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorFigures(_Frozen):
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


class PhaseFigures(_Frozen):
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


class LinearRow(_Frozen):
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


class ClusterSummary(_Frozen):
    """How input channels were clustered."""

    clusters: int
    jointly: bool
    warning: str


class StatsReport(_Frozen):
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


@dataclass(frozen=True)
class StatsResult:
    """What :func:`stats` made."""

    output: Path
    recipe: Recipe
    report: StatsReport


@dataclass(frozen=True)
class _Measured:
    """One model: everything by the name of the linear."""

    moments: dict[str, LinearMoments]
    damage: dict[str, LinearDamage]
    labels: dict[str, Tensor]


def stats(
    recipe: Recipe,
    options: RunOptions,
    *,
    jointly: bool = False,
    model: Any = None,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> StatsResult:
    """Measure every decoder linear before and after rotation, and write what was found.

    Args:
        recipe: what to do. ``rotate`` ``auto`` is R1, R2 and R4, as far as the architecture offers
            them; ``dtype`` ``auto`` is float32.
        options: where, and what to reuse.
        jointly: with one activation scale for each cluster, cluster the channels of all linears
            that read the same ones at once.
        model: a Hugging Face causal LM to use instead of ``recipe.model``.
        tokenizer: its tokenizer, where the model's folder is not at hand.
        progress: called after every unit of work.

    Raises:
        RotqError: a known failure; nothing was written then.
    """
    check_output(options.output, options.overwrite)
    run = Run(_in_float32(recipe), options, model, tokenizer, progress)
    if _clusters(run) is not None:
        logger.warning("%s", NO_FUSED_KERNEL)
    kinds = kinds_of(candidate_sets(run.recipe, run.source, run.given)[-1])
    measured = {"before": _measure(run, run.fuse(RotationSet()), jointly)}
    trained = run.rotations(kinds)
    if trained.rotations:
        measured["after"] = _measure(run, run.fuse(trained.rotations), jointly)
    report = _report(run, trained, measured, jointly)
    with atomic_folder(options.output, overwrite=options.overwrite) as folder:
        save_file(
            _tensors(measured),
            folder / TENSORS_FILE,
            metadata={"format_version": str(STATS_FORMAT_VERSION)},
        )
        (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        report.save(folder)
    return StatsResult(options.output, recipe, report)


def _report(
    run: Run, trained: TrainedRotations, measured: Mapping[str, _Measured], jointly: bool
) -> StatsReport:
    clusters = _clusters(run)
    return StatsReport(
        model=ModelSummary(
            source=run.source.name,
            model_type=run.source.config.model_type,
            parameters=run.source.parameters(),
            fingerprint=run.fingerprint,
        ),
        scheme=run.recipe.scheme,
        rotate=",".join(trained.rotations.kinds()) or "none",
        clusters=None
        if clusters is None
        else ClusterSummary(clusters=clusters, jointly=jointly, warning=NO_FUSED_KERNEL),
        calibration=CalibrationSummary(
            dataset=run.recipe.calibration.dataset,
            rows=len(run.rows.train),
            tokens=sum(row.numel() for row in run.rows.train),
            sha256=token_hash(run.rows.train),
        ),
        rotations=rotation_summaries(trained.rotations),
        rotation_gate=[RotationGateRow.model_validate(asdict(row)) for row in trained.table],
        linears=_rows(_specs(run), measured),
        seconds=run.seconds,
        versions=package_versions(),
    )


def _in_float32(recipe: Recipe) -> Recipe:
    """Nothing is written for a target here, so no backend decides the dtype."""
    return recipe.model_copy(update={"dtype": "float32"}) if recipe.dtype == "auto" else recipe


def _clusters(run: Run) -> int | None:
    """The clusters of ``activations.granularity: cluster:K``."""
    granularity = run.scheme.activation and run.scheme.activation.granularity
    return granularity.clusters if isinstance(granularity, PerCluster) else None


def _specs(run: Run) -> list[LinearSpec]:
    names = set(run.source.wiring.linear_names)
    return [spec for spec in run.source.wiring.linears if spec.name in names]


def _measure(run: Run, fused: FusedModel, jointly: bool) -> _Measured:
    """Two passes over the calibration rows: the limits and moments first, then what depends on
    them.
    """
    network = materialize(fused, device=run.device)
    specs, schemes, k = _specs(run), run.quantization.linears, _clusters(run)
    batches = length_batches(run.rows.train, run.recipe.calibration.batch_size)
    with run.stage("statistics"):
        moments = linear_moments(network, specs, batches, progress=run.progress)
        labels: dict[str, Tensor] = {}
        if k is not None:
            inputs = {name: found.input for name, found in moments.items()}
            clustered = [spec for spec in specs if _is_clustered(schemes.get(spec.name))]
            labels = cluster_linears(inputs, clustered, k, jointly=jointly, seed=run.recipe.seed)
        damage = linear_damage(
            network, specs, moments, schemes, batches, clusters=labels, progress=run.progress
        )
    return _Measured(moments, damage, labels)


def _is_clustered(scheme: LinearScheme | None) -> bool:
    return (
        scheme is not None
        and scheme.input is not None
        and isinstance(scheme.input.granularity, PerCluster)
    )


def _rows(specs: list[LinearSpec], measured: Mapping[str, _Measured]) -> list[LinearRow]:
    rows = []
    for spec in specs:
        moments = measured["before"].moments[spec.name]
        rows.append(
            LinearRow(
                linear=spec.name,
                reads=str(spec.reads),
                in_features=moments.input.mean.numel(),
                out_features=moments.output.mean.numel(),
                before=_figures(measured["before"], spec.name),
                after=_figures(measured["after"], spec.name) if "after" in measured else None,
            )
        )
    return sorted(rows, key=lambda row: -row.damage)


def _figures(measured: _Measured, name: str) -> PhaseFigures:
    moments, damage = measured.moments[name], measured.damage[name]
    return PhaseFigures(
        damage=damage.damage,
        input_error=damage.input_error,
        weight_error=damage.weight_error,
        input=_tensor_figures(moments.input, damage.input_outliers),
        output=_tensor_figures(moments.output, damage.output_outliers),
        weight=_tensor_figures(moments.weight_in, damage.weight_outliers),
    )


def _tensor_figures(moments: MomentStatistics, outliers: float) -> TensorFigures:
    pooled = moments.pooled()
    absmax, median = float(pooled.absmax), float(moments.absmax.median())
    return TensorFigures(
        absmax=absmax,
        std=float(pooled.std),
        kurtosis=float(pooled.kurtosis),
        outliers=outliers,
        peak=absmax / median if median > 0 else None,
    )


def _tensors(measured: Mapping[str, _Measured]) -> dict[str, Tensor]:
    """Everything that is a vector over channels, in float32; the keys are described in
    ``docs/stats.md``.
    """
    tensors = {}
    for phase, found in measured.items():
        for name, moments in found.moments.items():
            for part in _PARTS:
                for key, attribute in _CHANNELS.items():
                    tensors[f"{phase}/{name}/{part}/{key}"] = getattr(
                        getattr(moments, part), attribute
                    ).float()
        for name, labels in found.labels.items():
            # joint linears share theirs, a file must not
            tensors[f"{phase}/{name}/clusters"] = labels.clone()
    return tensors


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures as the columns of a table: ``after_input_kurtosis``."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}_")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
