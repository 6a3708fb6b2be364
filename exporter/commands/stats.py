"""``rotq stats``: statistics of every decoder linear before and after rotation, and what the scheme
does to each.

``before`` is the model with its norms folded into the linears and nothing rotated, ``after`` the
same with rotations folded in and, for R3 and R4, running online. The original itself would mix the
norms' gains into what rotations do. A model whose family is not in the table is measured as it is,
``before`` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor

from calib.architectures import LinearSpec
from calib.data.batches import length_batches
from calib.data.tokens import token_hash
from calib.fusing import FusedModel, materialize
from calib.process.ambient import plain_torch
from calib.process.progress import Progress, silent
from calib.rotations.from_capture import TrainedRotations
from calib.rotations.rotate import Rotate
from calib.rotations.rotation_set import RotationSet
from calib.schemes import LinearScheme, PerCluster, Scheme
from calib.stats.clusters import NO_FUSED_KERNEL, cluster_linears
from calib.stats.damage import LinearDamage, linear_damage
from calib.stats.linears import LinearMoments, linear_moments
from calib.stats.moments import MomentStatistics
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.describe import package_versions, rotation_summaries, source_summary
from exporter.reporting.html import page
from exporter.reporting.report import CalibrationSummary, RotationGateRow
from exporter.reporting.stats import (
    STATS_FORMAT_VERSION,
    ClusterSummary,
    LinearRow,
    PhaseFigures,
    StatsReport,
    TensorFigures,
)
from exporter.run.destination import Destination
from exporter.run.generic import check_generic
from exporter.run.inputs import Inputs, open_inputs
from exporter.run.options import RunOptions
from exporter.run.quantizing import warn_of_slow_choices
from exporter.run.reservation import reserved
from exporter.run.rotations import candidate_sets, imported_rotations, trained_rotations
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import WorkDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TENSORS_FILE = "stats.safetensors"

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


@dataclass(frozen=True, repr=False)
class StatsResult:
    """What :func:`stats` made."""

    output: Path
    recipe: Recipe
    report: StatsReport

    def __repr__(self) -> str:
        words = ", ".join(f"{name} {value}" for name, value in self._facts().items())
        return f"StatsResult('{self.output}': {words})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return page(str(self.output), self._facts())

    def _facts(self) -> dict[str, object]:
        return {
            "scheme": self.report.scheme,
            "rotate": self.report.rotate,
            "linears": len(self.report.linears),
        }


@dataclass(frozen=True)
class _Measured:
    """One model: everything by the name of the linear."""

    moments: dict[str, LinearMoments]
    damage: dict[str, LinearDamage]
    labels: dict[str, Tensor]


@plain_torch()
def stats(
    recipe: Recipe,
    options: RunOptions,
    *,
    jointly: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
    clock = Stopwatch(progress)
    with reserved(recipe, options) as output:
        warn_of_slow_choices(recipe)
        inputs = open_inputs(_in_float32(recipe), Destination.of(recipe), model, tokenizer)
        work = WorkDir.of(options, inputs)
        check_generic(recipe, inputs.source.wiring.architecture, "stats")
        if _clusters(inputs.scheme) is not None:
            logger.warning("%s", NO_FUSED_KERNEL)
        imported = imported_rotations(recipe, inputs.source)
        kinds = candidate_sets(inputs, imported)[-1].certain
        rows = inputs.rows(clock).train
        passes = _Passes(inputs, inputs.quantization().linears, rows, jointly)

        measured = {"before": passes.measure(inputs.fuse(RotationSet(), clock), clock)}
        trained = trained_rotations(kinds, inputs, imported, rows, options, work, clock)
        if trained.rotations:
            measured["after"] = passes.measure(inputs.fuse(trained.rotations, clock), clock)

        report = _report(passes, trained, measured, clock)
        with output.folder() as folder:
            save_file(
                _tensors(measured),
                folder / TENSORS_FILE,
                metadata={"format_version": str(STATS_FORMAT_VERSION)},
            )
            (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
            report.save(folder)
    return StatsResult(options.output, recipe, report)


@dataclass(frozen=True)
class _Passes:
    """What every model is measured on, and for."""

    inputs: Inputs
    schemes: Mapping[str, LinearScheme]
    rows: Sequence[Tensor]
    jointly: bool
    """Whether linears that read the same channels are clustered at once."""

    @property
    def specs(self) -> list[LinearSpec]:
        """The decoder's linears."""
        source = self.inputs.source
        names = set(source.wiring.linear_names)
        return [spec for spec in source.wiring.linears if spec.name in names]

    def measure(self, fused: FusedModel, clock: Stopwatch) -> _Measured:
        """Two passes over the calibration rows: the limits and moments first, then what depends on
        them.
        """
        recipe, specs = self.inputs.recipe, self.specs
        network = materialize(fused, device=self.inputs.device)
        k = _clusters(self.inputs.scheme)
        batches = length_batches(self.rows, recipe.calibration.batch_size)

        with clock.stage("statistics"):
            moments = linear_moments(network, specs, batches, progress=clock.progress)
            labels: dict[str, Tensor] = {}
            if k is not None:
                inputs = {name: moment.input for name, moment in moments.items()}
                clustered = [spec for spec in specs if _is_clustered(self.schemes.get(spec.name))]
                labels = cluster_linears(
                    inputs, clustered, k, jointly=self.jointly, seed=recipe.seed
                )
            damage = linear_damage(
                network,
                specs,
                moments,
                self.schemes,
                batches,
                clusters=labels,
                progress=clock.progress,
            )
        return _Measured(moments, damage, labels)


def _report(
    passes: _Passes,
    trained: TrainedRotations,
    measured: Mapping[str, _Measured],
    clock: Stopwatch,
) -> StatsReport:
    inputs, rows = passes.inputs, passes.rows
    clusters = _clusters(inputs.scheme)
    return StatsReport(
        model=source_summary(inputs.source),
        scheme=inputs.recipe.scheme,
        rotate=str(Rotate.of(trained.rotations.kinds())),
        clusters=None
        if clusters is None
        else ClusterSummary(clusters=clusters, jointly=passes.jointly, warning=NO_FUSED_KERNEL),
        calibration=CalibrationSummary(
            dataset=inputs.recipe.calibration.dataset,
            rows=len(rows),
            tokens=sum(row.numel() for row in rows),
            sha256=token_hash(rows),
        ),
        rotations=rotation_summaries(trained.rotations),
        rotation_gate=[RotationGateRow.model_validate(asdict(row)) for row in trained.table],
        linears=_rows(passes.specs, measured),
        seconds=clock.seconds,
        versions=package_versions(),
    )


def _in_float32(recipe: Recipe) -> Recipe:
    """Nothing is written for a target here, so no backend decides the dtype."""
    return recipe.model_copy(update={"dtype": "float32"}) if recipe.dtype == "auto" else recipe


def _clusters(scheme: Scheme) -> int | None:
    """The clusters of ``activations.granularity: cluster:K``."""
    granularity = scheme.activation and scheme.activation.granularity
    return granularity.clusters if isinstance(granularity, PerCluster) else None


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
    for phase, model in measured.items():
        for name, moments in model.moments.items():
            for part in _PARTS:
                for key, attribute in _CHANNELS.items():
                    tensors[f"{phase}/{name}/{part}/{key}"] = getattr(
                        getattr(moments, part), attribute
                    ).float()
        for name, labels in model.labels.items():
            # joint linears share theirs, a file must not
            tensors[f"{phase}/{name}/clusters"] = labels.clone()
    return tensors
