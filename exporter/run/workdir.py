"""A folder in which a run keeps what it has finished, so that a later run can go on from there.

It holds ``rotq.yaml`` and one folder per finished step. A resume with another setting is refused by
name: mixing steps of two recipes would give a model that neither describes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from calib.errors import OutputError
from exporter.output import atomic_folder
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe

CAPTURE, ARTIFACT, WALK = "capture", "artifact", "layerwise"
_FREE = (
    "backend",
    "target",
    "logits",
    "kv_buffer",
    "max_shard_size",
    "evaluation",
    "layerwise.max_memory",
)
"""Settings, and sections of them, that no kept step depends on."""


class WorkDir:
    """The finished steps of a run in ``folder``; with ``folder`` ``None`` nothing is kept.

    Raises:
        OutputError: the folder holds another run and ``resume`` is not given, or a setting differs
            from that run's.
    """

    def __init__(self, folder: Path | None, recipe: Recipe, *, resume: bool) -> None:
        self.folder = folder
        if folder is None:
            if resume:
                raise OutputError(
                    "--resume needs the folder to resume from", hint="give --work-dir DIR as well"
                )
            return
        kept = folder / RECIPE_FILE
        if kept.is_file():
            if not resume:
                raise OutputError(
                    f"the work folder '{folder}' holds a run already",
                    hint="give --resume to go on, or another --work-dir",
                )
            _check_same(load_recipe(kept), recipe, folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(recipe.to_yaml(), encoding="utf-8")

    def finished(self, step: str) -> Path | None:
        """The folder of a finished step, or ``None``."""
        if self.folder is None or not (self.folder / step).is_dir():
            return None
        return self.folder / step

    def step(self, name: str) -> Path:
        """The folder of a step that keeps what it has finished by itself, made if it is not
        there.
        """
        assert self.folder is not None  # asked for only where there is one
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return path

    def keep(self, step: str, save: Callable[[Path], object]) -> None:
        """Keep a step: ``save(folder)`` writes it, and it appears whole or not at all."""
        if self.folder is not None:
            with atomic_folder(self.folder / step) as partial:
                save(partial)


def _check_same(kept: Recipe, wanted: Recipe, folder: Path) -> None:
    before, now = (
        dict(_flatten(kept.model_dump(mode="json"))),
        dict(_flatten(wanted.model_dump(mode="json"))),
    )
    free = tuple(f"{key}." for key in _FREE)
    changed = [key for key in before if not f"{key}.".startswith(free) and before[key] != now[key]]
    if changed:
        key = changed[0]
        more = (
            f" (and {len(changed) - 1} more: {', '.join(changed[1:])})" if len(changed) > 1 else ""
        )
        raise OutputError(
            f"cannot resume in '{folder}': {key} was {yaml.safe_dump(before[key]).splitlines()[0]}"
            f" and is now {yaml.safe_dump(now[key]).splitlines()[0]}{more}",
            hint="resume with the settings it was started with, or start in another --work-dir",
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
