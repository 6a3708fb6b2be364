"""From a quantized model to the folder of each target: files, parity check, report."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from backends.base import WriteOptions
from calib.artifact import cast_model
from exporter.output import write_list
from exporter.parity import Subject, check_parity, kept_digests
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.describe import describe, finish, write_side_files
from exporter.reporting.growth import growth_warning
from exporter.reporting.report import ParityRow, Report
from exporter.run.calibrated import Calibrated
from exporter.run.destination import Destination
from exporter.run.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


def write_targets(
    calibrated: Calibrated, destination: Destination, folder: Path, clock: Stopwatch
) -> dict[str, Report]:
    """Write for every target: the only one into ``folder``, each of several into a folder of its
    name.

    Args:
        calibrated: the model, and what to compare it with.
        destination: backend and targets.
        folder: an empty one.
        clock: what was done before is in the report of every target.
    """
    recipe = calibrated.recipe
    if len(destination.targets) == 1:
        (target,) = destination.targets
        return {target: _write(calibrated, recipe, destination, target, folder, clock)}

    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    reports = {}
    for target in destination.targets:
        inner = folder / target
        inner.mkdir()
        own = recipe.model_copy(update={"target": target})
        reports[target] = _write(calibrated, own, destination, target, inner, clock.copy())
        write_list(inner)  # so that it may be replaced alone
    return reports


def _write(
    calibrated: Calibrated,
    recipe: Recipe,
    destination: Destination,
    target: str,
    folder: Path,
    clock: Stopwatch,
) -> Report:
    """Write, check and describe one output folder."""
    backend, stored = destination.backend, str(calibrated.quantized.dtype).removeprefix("torch.")
    name = destination.dtype(target, recipe.dtype, lambda: stored)
    quantized = cast_model(calibrated.quantized, getattr(torch, name))
    if backend.compute_dtype(target) is None:
        # Whoever repeats the run from the model has to be told what the artifact was in.
        recipe = recipe.model_copy(update={"dtype": name})

    with clock.stage("write"):
        options = WriteOptions(
            target,
            logits=recipe.logits,
            kv_buffer=recipe.kv_buffer,
            max_shard_bytes=recipe.max_shard_bytes,
            progress=clock.progress,
        )
        backend.write(quantized, folder, options)
        write_side_files(quantized, recipe, folder)

        digests = kept_digests(quantized, backend, folder, target)

    parity: list[ParityRow] = []
    if calibrated.evaluation is not None:
        with clock.stage("parity"):
            source, fused = calibrated.floats(quantized.dtype, clock)
            subject = Subject(
                quantized,
                backend,
                target,
                folder,
                calibrated.evaluation,
                source=source,
                fused=fused,
                digests=digests,
                device=calibrated.device,
                last=recipe.logits == "last",
            )
            parity = check_parity(subject, clock.progress)

    report = describe(quantized, parity, folder, backend, target, clock.seconds)
    report = report.model_copy(update={"stored": digests})
    grown = growth_warning(report.layers, lambda: backend.contents(folder, target))
    if grown is not None:
        logger.warning("target '%s': %s", target, grown)
    return finish(report, recipe, folder)
