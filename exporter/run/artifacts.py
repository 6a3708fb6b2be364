"""Opening what an earlier run has calibrated, for ``--from-artifact`` and ``--resume``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from torch import Tensor

from calib.architectures import architecture_of
from calib.artifact import QuantizedModel, load_artifact
from calib.errors import CheckpointError, RotqError
from exporter.recipe import Recipe, recipe_of_artifact
from exporter.run.calibrated import Calibrated
from exporter.run.destination import Destination
from exporter.run.generic import check_generic
from exporter.run.inputs import Inputs, resolve_device
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import WALK, WorkDir
from exporter.source import Source, load_tokenizer, open_source, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_original(
    recipe: Recipe, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> Source | None:
    """The original of an artifact, if it is at hand: an artifact may have travelled without it. The
    parity check then says what it cannot compare.
    """
    try:
        # What was left out when it was calibrated was accepted then: the fingerprint is compared.
        accepted = recipe.model_copy(update={"ignore_unused": True})
        return open_source(accepted, model, tokenizer)
    except RotqError:
        return None


def open_artifact(
    folder: Path,
    recipe: Recipe,
    source: Source | None,
    destination: Destination | None,
    clock: Stopwatch,
    *,
    verify: bool,
) -> Calibrated:
    """What ``rotq calibrate`` wrote into ``folder``, for ``--from-artifact``.

    The recipe of the run becomes the one that the artifact was made by, but for what is still to be
    done: a recipe that says otherwise would describe another model.

    Args:
        folder: the artifact.
        recipe: how it is to be written.
        source: its original, where it is at hand.
        destination: what must be able to express it, if anything.
        clock: times the reading.
        verify: whether it is to be compared with its original.

    Raises:
        CheckpointError: the artifact is damaged, or made from another model than ``source``; or
            its family is not in the table, and the original is not at hand.
        BackendError: a target cannot express it.
    """
    quantized = checked(load_artifact(folder), recipe, destination)
    if destination is not None:
        family = architecture_of(quantized.config)
        check_generic(Recipe(), family, "export", verify=verify, original=source is not None)
    if source is not None:
        hint = "name the original with -m/--model, or give --no-verify"
        _check_original(source, quantized, folder, hint)
    recipe = recipe_of_artifact(quantized.provenance.recipe, recipe, folder)
    return Calibrated(
        recipe,
        quantized,
        resolve_device(recipe.device),
        source,
        evaluation=evaluation_rows(recipe, quantized, clock) if verify else None,
        travelled=True,
    )


def open_finished(
    folder: Path,
    inputs: Inputs,
    destination: Destination | None,
    work: WorkDir,
    clock: Stopwatch,
    *,
    verify: bool,
) -> Calibrated:
    """The quantized model that an interrupted run has finished in ``folder``.

    Args:
        folder: of the finished step.
        inputs: the run, with the settings of the interrupted one.
        destination: what must be able to express it, if anything.
        work: where the step was kept.
        clock: times the reading.
        verify: whether it is to be compared with its original.

    Raises:
        CheckpointError: the artifact is damaged, or made from another model.
        BackendError: a target cannot express it.
    """
    quantized = checked(load_artifact(folder), inputs.recipe, destination)
    _check_original(inputs.source, quantized, folder, "use another --work-dir")
    # The run may have ended between keeping the artifact and removing what it was made in.
    work.remove(WALK)
    # what the run settled by itself, such as the size of blocks, is in the artifact alone
    recipe = recipe_of_artifact(quantized.provenance.recipe, inputs.recipe, folder)
    return Calibrated(
        recipe,
        quantized,
        inputs.device,
        inputs.source,
        evaluation=evaluation_rows(recipe, quantized, clock) if verify else None,
        work=work,
    )


def checked(
    quantized: QuantizedModel, recipe: Recipe, destination: Destination | None
) -> QuantizedModel:
    """``quantized``, which every target can express."""
    if destination is not None:
        cache = None if quantized.cache is None else quantized.cache.scheme
        schemes, kinds = quantized.schemes(), quantized.rotations.kinds()
        length = quantized.prefix_length
        destination.check(recipe, quantized.config, schemes, cache, kinds, length)
        destination.warn(schemes, kinds)
    return quantized


def _check_original(source: Source, quantized: QuantizedModel, folder: Path, hint: str) -> None:
    """Refuse an artifact of other weights than those at hand."""
    if source.fingerprint != quantized.provenance.fingerprint:
        raise CheckpointError(
            f"'{source.name}' is not the model that '{folder}' was made from: the fingerprint"
            " of its weights differs",
            hint=hint,
        )


def evaluation_rows(
    recipe: Recipe, quantized: QuantizedModel, clock: Stopwatch
) -> Sequence[Tensor]:
    """Rows by the tokenizer that travels with the artifact."""
    with clock.stage("data"):
        files = quantized.files
        tokenizer = load_tokenizer(next(iter(files.values())).parent if files else Path())
        return read_rows(recipe, tokenizer, SimpleNamespace(**quantized.config)).evaluation
