"""Which files a run would write. ``*`` stands for the number of a shard, and for how many there
are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from calib.schemes import LinearScheme
from exporter.output import LIST_FILE
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.card import PICTURES
from exporter.reporting.report import (
    CARD_FILE,
    PAGE_FILE,
    REPORT_FILE,
    ROTATE_REPORT_FILE,
    SMOOTHING_FILE,
)
from exporter.run.destination import Destination

_ROTATIONS = ("rotations.safetensors", "rotations.json")
_CAPTURE = ("manifest.json", "statistics.safetensors", "r1.safetensors", "r2.safetensors")
_CONFIGS = ("config.json", "generation_config.json")
HUB_SHARD_BYTES = 5 * 10**9
"""What huggingface_hub splits an artifact at."""
CHECKPOINT_SHARD_BYTES = 50 * 10**9
"""What transformers splits a checkpoint at."""


def capture_files() -> tuple[str, ...]:
    """Of ``rotq capture``."""
    return (*_CAPTURE, RECIPE_FILE, LIST_FILE)


def rotate_files(side_files: Collection[str], nbytes: int) -> tuple[str, ...]:
    """Of ``rotq rotate``.

    Args:
        side_files: files of the checkpoint that every output carries along.
        nbytes: of the weights.
    """
    weights = _sharded("model", nbytes, CHECKPOINT_SHARD_BYTES)
    last = (RECIPE_FILE, ROTATE_REPORT_FILE, CARD_FILE, LIST_FILE)
    return _distinct(*weights, *_CONFIGS, *side_files, *_ROTATIONS, *last)


def calibrate_files(side_files: Collection[str], nbytes: int) -> tuple[str, ...]:
    """Of ``rotq calibrate``, whose manifest holds the config; arguments as for
    :func:`rotate_files`.
    """
    weights = _sharded("quantized_model", nbytes, HUB_SHARD_BYTES)
    side = [name for name in side_files if name != "config.json"]
    return _distinct(*weights, "quantized_model.json", *side, *_ROTATIONS, RECIPE_FILE, LIST_FILE)


def export_files(
    recipe: Recipe,
    destination: Destination,
    linears: Mapping[str, LinearScheme],
    side_files: Collection[str],
    nbytes: Mapping[str, int],
    *,
    page: bool = False,
) -> tuple[str, ...]:
    """Of ``rotq export``: what the backend says, and what it leaves to the front door.

    Args:
        recipe: says how the model is to be written.
        destination: backend and targets.
        linears: how each linear is quantized.
        side_files: files of the checkpoint that every output carries along.
        nbytes: of the weights, by target.
        page: whether the page of the report is drawn, and the pictures of the card.
    """
    smoothing = () if recipe.smoothing == "none" else (SMOOTHING_FILE,)
    drawn = (PAGE_FILE, *PICTURES) if page else ()
    last = (*_ROTATIONS, *smoothing, RECIPE_FILE, *drawn, REPORT_FILE, CARD_FILE, LIST_FILE)
    files: dict[str, tuple[str, ...]] = {}
    for target in destination.targets:
        written = destination.files(target, recipe, linears, nbytes[target])
        files[target] = _distinct(*written, "config.json", *side_files, *last)

    if len(files) == 1:
        return next(iter(files.values()))
    inner = (f"{target}/{name}" for target, names in files.items() for name in names)
    return (RECIPE_FILE, *inner, LIST_FILE)


def _sharded(stem: str, nbytes: int, limit: int) -> tuple[str, ...]:
    if nbytes <= limit:
        return (f"{stem}.safetensors",)
    return (f"{stem}-*-of-*.safetensors", f"{stem}.safetensors.index.json")


def _distinct(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
