"""From a quantized model to the folder of each target: files, parity check, report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import torch

from backends.base import WriteOptions
from backends.cpu import cpu_words
from calib.artifact import cast_model
from calib.data.tokens import token_hash
from calib.files.sealed import seal_of
from exporter.output import sha256_tree, write_list
from exporter.parity import Check, Subject, check_parity, kept_digests
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.describe import describe, finish, write_side_files
from exporter.reporting.growth import growth_warning
from exporter.reporting.page_files import write_page_files
from exporter.reporting.report import ParityRow, Report
from exporter.run.calibrated import Calibrated
from exporter.run.destination import Destination
from exporter.run.remedies import remedies_of
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import PARITY, WorkDir

logger = logging.getLogger(__name__)


def write_targets(
    calibrated: Calibrated,
    destination: Destination,
    folder: Path,
    clock: Stopwatch,
    shown: Path | None = None,
) -> dict[str, Report]:
    """Write for every target: the only one into ``folder``, each of several into a folder of its
    name.

    Args:
        calibrated: the model, and what to compare it with.
        destination: backend and targets.
        folder: an empty one.
        clock: what was done before is in the report of every target.
        shown: where ``folder`` will be, on the pages that are drawn; ``None``: none are.
    """
    recipe = calibrated.recipe
    if len(destination.targets) == 1:
        (target,) = destination.targets
        return {target: _write(calibrated, recipe, destination, target, folder, clock, shown)}

    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    reports, before = {}, clock.copy()
    for target in destination.targets:
        inner = folder / target
        inner.mkdir()
        own = recipe.model_copy(update={"target": target})
        aside = before.copy()
        there = None if shown is None else shown / target
        reports[target] = _write(calibrated, own, destination, target, inner, aside, there)
        clock.include(aside, before)
        write_list(inner)  # so that it may be replaced alone
    return reports


def _write(
    calibrated: Calibrated,
    recipe: Recipe,
    destination: Destination,
    target: str,
    folder: Path,
    clock: Stopwatch,
    shown: Path | None,
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
            int8_weights=recipe.int8_weights,
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
            parity = check_parity(subject, clock.progress, _remembering(calibrated.work, subject))

    report = describe(quantized, parity, folder, backend, target)
    report = report.model_copy(update={"stored": digests, **clock.figures()})
    if report.status == "failed":
        remedies = remedies_of(report, recipe, quantized.config, list(quantized.linears))
        report = report.model_copy(update={"remedies": remedies})
    grown = growth_warning(report.layers, lambda: backend.contents(folder, target))
    if grown is not None:
        logger.warning("target '%s': %s", target, grown)
    if shown is not None:
        write_page_files(report, recipe, folder, shown)
    return finish(report, recipe, folder)


def _remembering(work: WorkDir | None, subject: Subject) -> Callable[[str, Check], list[ParityRow]]:
    """What keeps the rungs of one output folder, as :func:`check_parity` takes it.

    They hang on the files that were written, the rows, the machine, and whatever is installed:
    runtimes come with packages of their own. A rung that could not be run may run another time.
    """
    if work is None or work.folder is None:
        return lambda rung, check: check()
    installed = sorted(f"{each.name} {each.version}" for each in distributions())
    made_of = {
        "backend": subject.backend.name,
        "target": subject.target,
        "files": seal_of(sha256_tree(subject.folder)),
        "rows": token_hash(subject.rows),
        "machine": [cpu_words(), torch.get_num_threads(), str(subject.device)],
        "installed": seal_of({"": installed}),
    }

    def remember(rung: str, check: Check) -> list[ParityRow]:
        rows = work.remembered(
            PARITY,
            {**made_of, "rung": rung},
            lambda: [row.model_dump(mode="json") for row in check()],
            lambda rows: all(row["measured"] is not None for row in rows),
        )
        return [ParityRow.model_validate(row) for row in rows]

    return remember
