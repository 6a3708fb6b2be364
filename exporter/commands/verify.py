"""``rotq verify``: the parity check again, on a folder that exists, from what the folder itself
holds.

The reference is computed from the integers and scales in the exported file, read back by the
backend; the checksums in ``report.json`` say whether these are still the ones that were exported.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from backends.base import Backend
from backends.cpu import cpu_words
from backends.registry import get_backend
from calib.artifact import Provenance, QuantizedModel
from calib.errors import CheckpointError
from calib.files.reading import read_json, reason_of
from calib.fusing import FusedModel
from calib.process.ambient import plain_torch
from calib.process.progress import Progress, silent
from calib.quantizing.calibrator import kept_reasons
from calib.rotations.files import load_rotations
from exporter.parity import Subject, check_parity
from exporter.recipe import Recipe
from exporter.reporting.describe import CONFIG_FILE, load_smoothing
from exporter.reporting.exported import check_expected, check_unchanged, read_export, update_export
from exporter.reporting.report import Report, parity_status
from exporter.run.calibrated import fused_again
from exporter.run.destination import Destination
from exporter.run.quantizing import customised_scheme
from exporter.run.remedies import remedies_of
from exporter.source import Source, open_source, read_rows

logger = logging.getLogger(__name__)


@plain_torch()
def verify(
    folder: Path,
    *,
    model: str | None = None,
    rows: int | None = None,
    expect_sha256: str | None = None,
    progress: Progress = silent,
) -> Report:
    """Check ``folder`` and update its report and card, where they can be written.

    Fewer rows than the export had prove less, and update nothing.

    Args:
        folder: what ``rotq export`` wrote.
        model: the float model, where it is no longer where the recipe says.
        rows: evaluation rows; by default the recipe's.
        expect_sha256: the :attr:`~exporter.reporting.report.Report.export_sha256` that the folder
            must have, as it came by another way than the folder.
        progress: called after each rung.

    Raises:
        CheckpointError: the folder is incomplete or was edited after the export, is another one
            than ``expect_sha256`` says, or ``model`` is another model.
    """
    report, written = read_export(folder)
    check_unchanged(folder, report)
    if expect_sha256 is not None:
        check_expected(folder, report, expect_sha256)

    proves_less = rows is not None and rows < written.evaluation.nsamples
    if proves_less:
        logger.warning(
            "%d evaluation rows prove less than the %d of the export: the verdict in '%s' stays as"
            " it is",
            rows,
            written.evaluation.nsamples,
            folder,
        )
    changes: dict[str, Any] = {"model": model or written.model}
    if rows is not None:
        changes["evaluation"] = written.evaluation.model_copy(update={"nsamples": rows})
    recipe = written.model_copy(update=changes)

    source = open_source(recipe)
    if source.fingerprint != report.model.fingerprint:
        raise CheckpointError(
            f"'{source.name}' is not the model that '{folder}' was exported from: the fingerprint"
            " of its weights differs",
            hint="name the original with -m/--model",
        )

    start = time.perf_counter()
    backend = get_backend(report.backend)
    fused, quantized = read_back(folder, report, recipe, source, backend)
    evaluation = read_rows(recipe, source.tokenizer, source.config).evaluation
    parity = check_parity(
        Subject(
            quantized,
            backend,
            report.target,
            folder,
            evaluation,
            source=source,
            fused=fused,
            digests=report.stored,
            last=recipe.logits == "last",
        ),
        progress,
    )

    report = report.model_copy(
        update={
            "parity": parity,
            "remedies": [],
            "status": parity_status(parity),
            "cpu": cpu_words(),
            "seconds": {**report.seconds, "verify": time.perf_counter() - start},
        }
    )
    if report.status == "failed":
        remedies = remedies_of(report, written, quantized.config, list(quantized.linears))
        report = report.model_copy(update={"remedies": remedies})
    return report if proves_less else update_export(folder, report, written)


def read_back(
    folder: Path, report: Report, recipe: Recipe, source: Source, backend: Backend
) -> tuple[FusedModel, QuantizedModel]:
    """The rotated float model and the quantized model, from what ``folder`` holds and the original
    weights.
    """
    rotations, smoothing = load_rotations(folder), load_smoothing(folder)
    linears = backend.read_linears(folder, report.target)
    destination = Destination(backend, (report.target,))
    name = report.dtype or destination.common_dtype(recipe.dtype, lambda: source.dtype)
    dtype = getattr(torch, name)
    prefix = report.prefix
    fused = fused_again(
        source,
        rotations,
        dtype,
        fold_norms=report.norms_folded,
        smoothing=smoothing,
        prefix=() if prefix is None else prefix.tokens,
        reason="" if prefix is None else prefix.reason,
        by_blocks=recipe.layerwise.enabled,
    )

    own = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    quantized = QuantizedModel(
        config=_read_config(folder),
        scheme=customised_scheme(recipe),
        dtype=dtype,
        linears=linears,
        floats={name: fused.state[name] for name in fused.state if name not in own},
        kept=kept_reasons(fused, linears),
        rotations=rotations,
        provenance=Provenance(
            source=report.model.source,
            fingerprint=report.model.fingerprint,
            recipe=recipe.model_dump(mode="json"),
            parameters=report.model.parameters,
            nbytes=report.layers.bytes_before,
            calibration_rows=report.calibration.rows,
            calibration_tokens=report.calibration.tokens,
            calibration_sha256=report.calibration.sha256,
            versions=report.versions,
            gate=tuple(row.model_dump() for row in report.gate),
            cpu=report.calibration.cpu,
            threads=report.calibration.threads,
            quantized=report.model.quantized,
        ),
        cache=backend.read_cache(folder, report.target),
        smoothing=smoothing,
        prefix=fused.prefix,
        norms_folded=fused.norms_folded,
    )
    return fused, quantized


def _read_config(folder: Path) -> dict[str, Any]:
    """The model's config; a runtime's may also say how the weights are stored, which is no business
    of the model.
    """
    try:
        config = read_json(folder / CONFIG_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{folder / CONFIG_FILE}' cannot be read: {reason_of(error)}",
            hint="export the model again",
        ) from error
    config.pop("quantization_config", None)
    return config
