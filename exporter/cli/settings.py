"""The resolved settings of a run as a reader wants them: short names, the few that matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.architectures import KINDS
from exporter.recipe import EMBEDDED, Recipe

if TYPE_CHECKING:
    from exporter.planning.stages import Goal
    from exporter.run.options import RunOptions


def settings(recipe: Recipe, options: RunOptions, goal: Goal) -> dict[str, str]:
    """Names and values, in the order of the run; what a goal does not use is left out."""
    data = recipe.calibration
    shown: dict[str, str] = {}
    if options.from_artifact is not None:
        shown["artifact"] = str(options.from_artifact)
    else:
        shown["model"] = _model(recipe)
    if recipe.trust_remote_code:
        shown["trust remote code"] = "yes: the model's own Python code runs"

    if goal == "export":
        shown |= _writing(recipe)
    if goal != "capture":
        shown["scheme"] = recipe.scheme
        if goal != "rotate":
            shown |= _finer_controls(recipe)

    if options.from_artifact is None:
        if goal != "capture":
            shown["rotate"] = str(
                recipe.rotate.folded(KINDS) if goal == "rotate" else recipe.rotate
            )
            if recipe.rotation.files:
                shown["rotations"] = ", ".join(recipe.rotation.files)
        text = "the embedded example text" if data.dataset == EMBEDDED else data.dataset
        shown["calibration"] = (
            f"{text}, {data.nsamples} rows of up to {data.seqlen} tokens, batches of"
            f" {data.batch_size}"
        )

    if options.from_capture is not None:
        shown["capture"] = f"reused from {options.from_capture}"
    shown["device"] = f"{recipe.device}, dtype {recipe.dtype}, seed {recipe.seed}"
    if goal == "export" and not options.verify:
        shown["parity"] = "not checked (--no-verify)"
    if options.work_dir is not None:
        shown["work dir"] = f"{options.work_dir}{' (resuming)' if options.resume else ''}"
    shown["output"] = f"{options.output}{' (overwriting)' if options.overwrite else ''}"
    return shown


def _model(recipe: Recipe) -> str:
    if recipe.model == EMBEDDED:
        return "the embedded example model (no -m/--model given)"
    return recipe.model + (f" at {recipe.revision}" if recipe.revision else "")


def _writing(recipe: Recipe) -> dict[str, str]:
    """What is written, and for what."""
    targets = ", ".join(target or "default" for target in recipe.targets)
    shown = {
        "backend": f"{recipe.backend}, target{'s' if len(recipe.targets) > 1 else ''} {targets}"
    }
    if recipe.logits == "last":
        shown["logits"] = "of the last token only"
    if recipe.kv_buffer == "shared":
        shown["kv buffer"] = "one that goes in and out, written in place"
    if recipe.int8_weights != "auto":
        shown["int8 weights"] = recipe.int8_weights
    if recipe.max_shard_size is not None:
        shown["shards"] = f"of up to {recipe.max_shard_size}"
    return shown


def _finer_controls(recipe: Recipe) -> dict[str, str]:
    """What differs from the scheme's own ways."""
    shown: dict[str, str] = {}
    if recipe.weights.algorithm != "rtn":
        shown["weights"] = recipe.weights.algorithm
    if recipe.activations.observer != "min_max":
        shown["observer"] = recipe.activations.observer
    if recipe.smoothing != "none":
        shown["smoothing"] = recipe.smoothing
    if recipe.widen != "auto":
        shown["wider inputs"] = recipe.widen
    if recipe.prefix != "auto":
        shown["prefix"] = str(recipe.prefix)
    if recipe.rotation.fold_norms != "auto":
        shown["norms"] = "folded" if recipe.rotation.fold_norms else "kept, where there is no R1"
    if recipe.kv is not None:
        shown["kv cache"] = recipe.kv
    if recipe.overrides:
        shown["overrides"] = ", ".join(
            f"{pattern}: {scheme}" for pattern, scheme in recipe.overrides.items()
        )
    if recipe.layerwise.enabled:
        ways = "asymmetric, " if recipe.layerwise.asym else ""
        shown["layer-wise"] = (
            f"yes, {ways}activations in memory up to {recipe.layerwise.max_memory}"
        )
    return shown
