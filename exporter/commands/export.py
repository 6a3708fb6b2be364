"""The run, from a float checkpoint to a folder that a runtime loads:

fold norms, capture, train R1 and R2, fuse, ModelOpt calibration, scales, QuantizedModel, backend,
parity.

Each step is a function of :mod:`exporter.run`; this module only puts them in order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from calib.architectures import KINDS
from calib.artifact import QuantizedModel, load_artifact, save_artifact
from calib.fusing import FusedModel
from calib.fusing.mapped import mapped
from calib.network.skeleton import portable_config
from calib.process.ambient import plain_torch
from calib.process.memory import give_back
from calib.process.progress import Progress, silent
from calib.quantizing.calibrator import check_blocks
from calib.quantizing.plan import Quantization
from calib.rotations.rotate import Rotate, union
from calib.rotations.rotation_set import RotationSet, idle_rotations
from exporter.output import Claim
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.html import page
from exporter.reporting.report import Report
from exporter.run.artifacts import open_artifact, open_finished, open_original
from exporter.run.calibrated import Calibrated
from exporter.run.calibrating import Calibrating, best_candidate
from exporter.run.calibration_text import warn_of_few_rows, warn_of_few_tokens
from exporter.run.capturing import captured
from exporter.run.destination import Destination
from exporter.run.generic import check_generic
from exporter.run.inputs import Inputs, open_inputs
from exporter.run.layerwise import layerwise_rotations, quantize_layerwise
from exporter.run.options import RunOptions
from exporter.run.prefix import chosen_prefix, massive_rows
from exporter.run.preflight import check_disk, check_libraries
from exporter.run.quantizing import warn_of_slow_choices
from exporter.run.reservation import reserved
from exporter.run.results import ExportResult
from exporter.run.rotations import (
    candidate_sets,
    gate_rotations,
    imported_rotations,
    trained_rotations,
)
from exporter.run.stopwatch import Stopwatch
from exporter.run.taken import quantized_by_modelopt, taken_from_modelopt
from exporter.run.workdir import ARTIFACT, FUSED, WALK, WorkDir
from exporter.run.writing import write_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class CalibrateResult:
    """What :func:`calibrate` made."""

    output: Path
    recipe: Recipe
    quantized: QuantizedModel

    def __repr__(self) -> str:
        words = ", ".join(f"{name} {value}" for name, value in self._facts().items())
        return f"CalibrateResult('{self.output}': {words})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return page(str(self.output), self._facts())

    def _facts(self) -> dict[str, object]:
        return {
            "scheme": self.recipe.scheme,
            "linears quantized": len(self.quantized.linears),
            "kept in float": len(self.quantized.kept),
        }


class NotAcceptedError(Exception):
    """An export that its caller did not accept; nothing was written."""


@plain_torch()
def export(
    recipe: Recipe,
    options: RunOptions,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = silent,
    accept: Callable[[Mapping[str, Report]], bool] | None = None,
) -> ExportResult:
    """Run everything and write the folder of a backend, or of several targets one folder each.

    Args:
        recipe: what to do.
        options: where, and what to reuse.
        model: a Hugging Face causal LM to use instead of ``recipe.model``.
        tokenizer: its tokenizer, where the model's folder is not at hand.
        progress: called after every unit of work.
        accept: whether what is written and checked, by its reports, takes its place; ``None``:
            always.

    Returns:
        The result; a report's status is ``failed`` where a parity figure missed its bound; the
        folder is kept.

    Raises:
        RotqError: a known failure; nothing was written then.
        NotAcceptedError: by ``accept``; nothing was written either.
    """
    clock, destination = Stopwatch(progress), Destination.of(recipe)
    with (
        clock.profiled(options.profile),
        reserved(recipe, options) as output,
        _calibrated(recipe, options, output, destination, clock, model, tokenizer) as calibrated,
    ):
        with output.folder() as folder:
            shown = options.output if options.report else None
            reports = write_targets(calibrated, destination, folder, clock, shown)
            if accept is not None and not accept(reports):
                raise NotAcceptedError
        return ExportResult(options.output, calibrated.recipe, reports)


@plain_torch()
def calibrate(
    recipe: Recipe,
    options: RunOptions,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = silent,
) -> CalibrateResult:
    """Stop at the saved :class:`~calib.artifact.QuantizedModel`; arguments and errors as for
    :func:`export`.
    """
    clock, destination = Stopwatch(progress), Destination.of(recipe)
    with (
        clock.profiled(options.profile),
        reserved(recipe, options) as output,
        _calibrated(
            recipe, options, output, destination, clock, model, tokenizer, write=False
        ) as calibrated,
    ):
        with output.folder() as folder, clock.stage("save"):
            save_artifact(calibrated.quantized, folder)
            (folder / RECIPE_FILE).write_text(calibrated.recipe.to_yaml(), encoding="utf-8")
        return CalibrateResult(options.output, calibrated.recipe, calibrated.quantized)


@plain_torch()
def run_capture(
    recipe: Recipe,
    options: RunOptions,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = silent,
) -> Path:
    """Only capture the statistics that rotations are trained on; arguments and errors as for
    :func:`export`.
    """
    clock, destination = Stopwatch(progress), Destination.of(recipe)
    with clock.profiled(options.profile), reserved(recipe, options) as output:
        warn_of_slow_choices(recipe)
        inputs = open_inputs(recipe, destination, model, tokenizer)
        check_generic(recipe, inputs.source.wiring.architecture, "capture")
        work = WorkDir.of(options, inputs)
        rows = inputs.rows(clock)
        prefix = chosen_prefix(inputs, inputs.quantization(), rows, destination, clock)
        tokens = () if prefix is None else prefix.tokens
        statistics = captured(inputs, rows.train, options, work, clock, tokens)
        with output.folder() as folder:
            statistics.write(folder)
            (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    return options.output


@contextmanager
def _calibrated(
    recipe: Recipe,
    options: RunOptions,
    output: Claim,
    destination: Destination,
    clock: Stopwatch,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    write: bool = True,
) -> Iterator[Calibrated]:
    """The quantized model: of an earlier run, or made now. A layer-wise one is memory-mapped, from
    a folder that may not outlive the block.

    Args:
        recipe: what to do.
        options: what to reuse.
        output: gives room beside the output for what is not finished.
        destination: what the model is for.
        clock: times the stages.
        model: a model object to start from.
        tokenizer: its tokenizer.
        write: whether the model will be written for the targets, which then must be able to express
            it, and compared with its original.
    """
    warn_of_slow_choices(recipe)
    verify, targets = write and options.verify, destination if write else None
    if targets is not None:
        check_libraries(targets, options)
    if quantized_by_modelopt(model):
        assert model is not None
        yield taken_from_modelopt(recipe, options, model, tokenizer, targets, clock, verify=verify)
        return
    if options.from_artifact is not None:
        source = open_original(recipe, model, tokenizer) if verify else None
        yield open_artifact(options.from_artifact, recipe, source, targets, clock, verify=verify)
        return

    inputs = open_inputs(recipe, destination, model, tokenizer)
    goal = "export" if write else "calibrate"
    family = inputs.source.wiring.architecture
    check_generic(recipe, family, goal, verify=options.verify or not write)
    work = WorkDir.of(options, inputs)
    finished = work.finished(ARTIFACT)
    if finished is not None:
        yield open_finished(finished, inputs, targets, work, clock, verify=verify)
        return

    # Everything that can be refused is, before the long job.
    if targets is not None:
        inputs = inputs.with_tables(targets)
        recipe = inputs.recipe
    quantization = inputs.quantization()
    imported = imported_rotations(recipe, inputs.source)
    _check_expressible(inputs, quantization, imported, targets)
    folders = len(destination.targets) if write else 1
    check_disk(options, folders * inputs.stored_bytes(quantization))
    sets = candidate_sets(inputs, imported, _left_out(inputs, targets))

    calibrating = _calibrating(inputs, quantization, targets, clock)
    evaluation = calibrating.rows.evaluation if verify else None
    if recipe.layerwise.enabled:
        with _blockwise(calibrating, imported, options, output, work, clock) as quantized:
            yield Calibrated(
                recipe, quantized, inputs.device, inputs.source, evaluation=evaluation, work=work
            )
        return
    quantized, fused = _whole(calibrating, sets, imported, options, work, clock)
    if evaluation is None:  # nothing will ask for the float model
        del fused
        yield Calibrated(recipe, quantized, inputs.device, inputs.source, work=work)
        return
    with output.scratch(FUSED) as folder:
        with clock.stage("fuse"):
            held = sum(tensor.nbytes for tensor in fused.state.values())
            quantized, fused = _unheld(quantized, fused, folder)
            give_back(held)
        yield Calibrated(
            recipe, quantized, inputs.device, inputs.source, fused, evaluation, work=work
        )


def _calibrating(
    inputs: Inputs, quantization: Quantization, targets: Destination | None, clock: Stopwatch
) -> Calibrating:
    """What every candidate has in common: the text, and the prefix."""
    rows = inputs.rows(clock)
    warn_of_few_rows(inputs.recipe, rows)
    warn_of_few_tokens(inputs.recipe, inputs.source, rows.train)
    prefix = chosen_prefix(inputs, quantization, rows, targets, clock)
    return Calibrating(inputs, quantization, rows, inputs.provenance(rows), prefix, targets)


def _whole(
    calibrating: Calibrating,
    sets: Sequence[Rotate],
    imported: RotationSet,
    options: RunOptions,
    work: WorkDir,
    clock: Stopwatch,
) -> tuple[QuantizedModel, FusedModel]:
    """The best of ``sets``, quantized, and the float model that it was quantized from."""
    inputs = calibrating.inputs
    trained = trained_rotations(
        union(sets),
        inputs,
        imported,
        calibrating.rows.train,
        options,
        work,
        clock,
        calibrating.tokens,
    )
    rotations = gate_rotations(sets, inputs, imported, trained.rotations)
    candidate, table = best_candidate(rotations, calibrating, work, clock)

    provenance = replace(
        candidate.quantized.provenance,
        gate=tuple(row.model_dump() for row in table),
        rotation_gate=tuple(asdict(row) for row in trained.table),
        training=tuple(asdict(curve) for curve in trained.training),
        massive=massive_rows(calibrating.prefix),
    )
    quantized = replace(candidate.quantized, provenance=provenance)
    work.keep(ARTIFACT, partial(save_artifact, quantized))
    return quantized, candidate.fused


def _unheld(
    quantized: QuantizedModel, fused: FusedModel, folder: Path
) -> tuple[QuantizedModel, FusedModel]:
    """Both with the float tensors, which they share, in ``folder`` and not in memory: parity reads
    them once in a while, beside models of its own.
    """
    lighter = mapped(fused, folder)
    floats = {
        name: lighter.state[name] if tensor is fused.state.get(name) else tensor
        for name, tensor in quantized.floats.items()
    }
    return replace(quantized, floats=floats), lighter


@contextmanager
def _blockwise(
    calibrating: Calibrating,
    imported: RotationSet,
    options: RunOptions,
    output: Claim,
    work: WorkDir,
    clock: Stopwatch,
) -> Iterator[QuantizedModel]:
    """The quantized model, memory-mapped: from the work folder, or from a temporary one beside the
    output.
    """
    trained = layerwise_rotations(calibrating, imported, options, work, clock)
    provenance = replace(
        calibrating.provenance,
        rotation_gate=tuple(asdict(row) for row in trained.table),
        training=tuple(asdict(curve) for curve in trained.training),
        massive=massive_rows(calibrating.prefix),
    )
    own = replace(calibrating, provenance=provenance)
    quantize = partial(quantize_layerwise, own, trained.rotations, options, clock)
    if options.work_dir is not None:
        walk = work.step(WALK)
        work.keep(ARTIFACT, partial(quantize, walk))
        work.remove(WALK)
        finished = work.finished(ARTIFACT)
        assert finished is not None  # it has just been kept
        yield load_artifact(finished)
        return

    with output.scratch(WALK) as walk, output.scratch(ARTIFACT) as folder:
        yield quantize(walk, folder)


def _check_expressible(
    inputs: Inputs,
    quantization: Quantization,
    imported: RotationSet,
    targets: Destination | None,
) -> None:
    """Refuse blocks that do not fit, and what a target cannot express; warn of what it runs
    slowly.
    """
    check_blocks(quantization, inputs.source.wiring)
    if targets is None:
        return
    recipe = inputs.recipe
    kinds = Rotate.of({*recipe.rotate.certain, *imported.kinds()}).certain
    targets.check(
        recipe,
        portable_config(inputs.source.config),
        quantization.linears,
        quantization.cache,
        kinds,
        recipe.certain_prefix,
    )
    targets.warn(quantization.linears, kinds)


def _left_out(inputs: Inputs, targets: Destination | None) -> Collection[str]:
    """Rotations that would do nothing in this model, or that a target cannot express; says so of
    those that ``--rotate auto`` would have compared.
    """
    reasons = idle_rotations(inputs.source.wiring)
    if targets is not None:
        config = portable_config(inputs.source.config)
        reasons = {**targets.refused_kinds(config), **reasons}
    compared = union(inputs.recipe.rotate.sets(KINDS, quantizes=inputs.quantizes))
    for kind in compared if inputs.recipe.rotate.auto else ():
        if kind in reasons:
            logger.warning("--rotate auto leaves %s out: %s", kind.upper(), reasons[kind])
    return reasons
