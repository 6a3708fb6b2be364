"""From a quantized model to the folder of each target: files, parity check, report."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backends.asking import check, warnings_of
from backends.base import Request, WriteOptions
from calib.artifact import QuantizedModel, cast_model
from calib.errors import RotqError
from calib.fusing import FusedModel
from calib.schemes import LinearScheme, TensorScheme
from calib.smoothing.smooth import fold_all
from exporter.parity import Subject, check_parity
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.describe import describe, finish, write_side_files
from exporter.reporting.report import ParityRow, Report
from exporter.run.dtypes import dtype_of
from exporter.source import Source

if TYPE_CHECKING:
    from exporter.commands.export import Run

logger = logging.getLogger(__name__)


def check_writable(
    run: Run,
    config: Mapping[str, Any],
    linears: Mapping[str, LinearScheme],
    cache: TensorScheme | None,
    rotations: Collection[str],
) -> None:
    """Refuse what a target of ``run`` cannot express, and warn of what it runs slowly, before the
    long job.

    Args:
        run: names backend and targets.
        config: Hugging Face config of the model.
        linears: how each linear is quantized.
        cache: how the KV cache is, if it is.
        rotations: kinds of rotations that it has for certain.

    Raises:
        BackendError: with the reason.
    """
    for target in run.targets:
        request = Request(
            target,
            linears=linears,
            cache=cache,
            rotations=tuple(rotations),
            config=config,
            logits=run.recipe.logits,
            kv_buffer=run.recipe.kv_buffer,
            dtype=run.recipe.dtype,
        )
        check(run.backend, request)
        for warning in warnings_of(run.backend, target, linears):
            logger.warning("target '%s': %s", target, warning)


def write_targets(run: Run, quantized: QuantizedModel, folder: Path) -> dict[str, Report]:
    """Write for every target of ``run``: the only one into ``folder``, each of several into a
    folder of its name.
    """
    if len(run.targets) == 1:
        return {run.targets[0]: _write(run, run.recipe, quantized, run.targets[0], folder)}
    (folder / RECIPE_FILE).write_text(run.recipe.to_yaml(), encoding="utf-8")
    reports = {}
    before = dict(run.seconds)
    for target in run.targets:
        run.seconds = dict(before)
        (folder / target).mkdir()
        recipe = run.recipe.model_copy(update={"target": target})
        reports[target] = _write(run, recipe, quantized, target, folder / target)
    return reports


def _write(
    run: Run, recipe: Recipe, quantized: QuantizedModel, target: str, folder: Path
) -> Report:
    """Write, check and describe one output folder."""
    name = dtype_of(
        recipe, run.backend, target, lambda: str(quantized.dtype).removeprefix("torch.")
    )
    quantized = cast_model(quantized, getattr(torch, name))
    recipe = (
        recipe.model_copy(update={"dtype": name})
        if run.backend.compute_dtype(target) is None
        else recipe
    )
    with run.stage("write"):
        options = WriteOptions(
            target,
            logits=recipe.logits,
            kv_buffer=recipe.kv_buffer,
            max_shard_bytes=recipe.max_shard_bytes,
            progress=run.progress,
        )
        run.backend.write(quantized, folder, options)
        write_side_files(quantized, recipe, folder)
    parity: list[ParityRow] = []
    if run.options.verify:
        with run.stage("parity"):
            parity = check_parity(_subject(run, quantized, target, folder), run.progress)
    report = describe(quantized, parity, folder, run.backend, target, run.seconds)
    return finish(report, recipe, folder)


def _subject(run: Run, quantized: QuantizedModel, target: str, folder: Path) -> Subject:
    source, fused = _original(run, quantized)
    return Subject(
        quantized,
        run.backend,
        target,
        folder,
        run.rows.evaluation,
        source=source,
        fused=fused,
        device=run.device,
        last=run.recipe.logits == "last",
    )


def _original(run: Run, quantized: QuantizedModel) -> tuple[Source | None, FusedModel | None]:
    """The float model before and after rotation, where it is at hand: an artifact may have
    travelled without it.
    """
    try:
        fused = run.fused
        if fused is None or fused.dtype != quantized.dtype:
            fused = fold_all(
                run.fuse(quantized.rotations, dtype=quantized.dtype), quantized.smoothing
            )
        return run.source, fused
    except RotqError:
        if run.options.from_artifact is None:
            raise
        return None, None
