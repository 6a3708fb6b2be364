"""Which files a run would write, with a remark where there is one.

What may be split has the name that it has in one piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from calib.schemes import LinearScheme
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.card import CARD_FILE
from exporter.reporting.report import REPORT_FILE, ROTATE_REPORT_FILE, SMOOTHING_FILE
from exporter.run.destination import Destination

_ROTATIONS = ("rotations.safetensors", "rotations.json")
_CAPTURE = ("manifest.json", "statistics.safetensors", "r1.safetensors", "r2.safetensors")
_CONFIGS = ("config.json", "generation_config.json")
_HUB_SHARDS = "sharded above 5 GB"
"""What huggingface_hub does to an artifact."""
_CHECKPOINT_SHARDS = "sharded above 50 GB"
"""What transformers does to a checkpoint."""


def capture_files() -> tuple[str, ...]:
    """Of ``rotq capture``."""
    return (*_CAPTURE, RECIPE_FILE)


def rotate_files(side_files: Iterable[str]) -> tuple[str, ...]:
    """Of ``rotq rotate``, whose checkpoint carries ``side_files`` along."""
    last = (RECIPE_FILE, ROTATE_REPORT_FILE, CARD_FILE)
    weights = {"model.safetensors": _CHECKPOINT_SHARDS}
    return _listed(weights, _CONFIGS, side_files, _ROTATIONS, last)


def calibrate_files(side_files: Iterable[str]) -> tuple[str, ...]:
    """Of ``rotq calibrate``, whose manifest holds the config."""
    weights = {"quantized_model.safetensors": _HUB_SHARDS, "quantized_model.json": ""}
    side = [name for name in side_files if name != "config.json"]
    return _listed(weights, side, _ROTATIONS, (RECIPE_FILE,))


def export_files(
    recipe: Recipe,
    destination: Destination,
    linears: Mapping[str, LinearScheme],
    side_files: Iterable[str],
) -> tuple[str, ...]:
    """Of ``rotq export``: what the backend says, and what it leaves to the front door.

    Args:
        recipe: says how the model is to be written.
        destination: backend and targets.
        linears: how each linear is quantized.
        side_files: files of the checkpoint that every output carries along.
    """
    smoothing = () if recipe.smoothing == "none" else (SMOOTHING_FILE,)
    own = (*_ROTATIONS, *smoothing, RECIPE_FILE, REPORT_FILE, CARD_FILE)
    files = {
        target: _listed(
            destination.files(target, recipe, linears), ("config.json", *side_files), own
        )
        for target in destination.targets
    }
    if len(files) == 1:
        return next(iter(files.values()))
    inner = (f"{target}/{name}" for target, names in files.items() for name in names)
    return (RECIPE_FILE, *inner)


def _listed(written: Mapping[str, str], *names: Iterable[str]) -> tuple[str, ...]:
    """Every file once, in order: what the weights are in, with its remarks, then ``names``."""
    remarks = dict(written)
    for name in (name for group in names for name in group):
        remarks.setdefault(name, "")
    return tuple(f"{name} ({remark})" if remark else name for name, remark in remarks.items())
