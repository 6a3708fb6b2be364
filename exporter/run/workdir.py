"""A folder in which a run keeps what it has finished, so that a later run can go on from there.

It holds ``rotq.yaml`` and one folder per finished step. A resume with another setting is refused by
name: mixing steps of two recipes would give a model that neither describes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from calib.errors import OutputError, RecipeError
from exporter.output import HOLDER_FILE, LOCK_FILE, atomic_folder, is_partial, replace_text
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe
from exporter.run.inputs import Inputs
from exporter.run.options import RunOptions

CAPTURE, ARTIFACT, WALK = "capture", "artifact", "layerwise"


class WorkDir:
    """The finished steps of a run in ``folder``; with ``folder`` ``None`` nothing is kept.

    Raises:
        OutputError: the folder holds another run and ``resume`` is not given, a setting differs
            from that run's, or it holds files but no run.
    """

    @classmethod
    def of(cls, options: RunOptions, inputs: Inputs) -> WorkDir:
        """That of a run. What is kept was rounded to its dtype, whichever target decided it."""
        name = str(inputs.dtype).removeprefix("torch.")
        recipe = inputs.recipe.model_copy(update={"dtype": name})
        return cls(options.work_dir, recipe, resume=options.resume)

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
            _check_same(_read_kept(kept), recipe, folder)
            return

        folder.mkdir(parents=True, exist_ok=True)
        _check_empty(folder)
        replace_text(kept, recipe.to_yaml())

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

    def remove(self, step: str) -> None:
        """Forget a step, if it is there."""
        if self.folder is not None:
            shutil.rmtree(self.folder / step, ignore_errors=True)

    def keep(self, step: str, save: Callable[[Path], object]) -> None:
        """Keep a step: ``save(folder)`` writes it, and it appears whole or not at all."""
        if self.folder is not None:
            with atomic_folder(self.folder / step) as partial:
                save(partial)


def _read_kept(path: Path) -> Recipe:
    """The recipe of the run that a work folder holds."""
    try:
        if path.stat().st_size:
            return load_recipe(path)
        reason = "it is empty"
    except RecipeError as error:
        reason = error.message
    raise OutputError(
        f"cannot resume in '{path.parent}': its {RECIPE_FILE} is damaged: {reason}",
        hint="start in another --work-dir; what is in this one cannot be trusted",
    )


def _check_empty(folder: Path) -> None:
    """Refuse a folder of somebody else: steps would be read from it, and removed."""
    names = sorted(path.name for path in folder.iterdir())
    locks = (LOCK_FILE, HOLDER_FILE)
    foreign = [name for name in names if name not in locks and not is_partial(name)]
    if foreign:
        raise OutputError(
            f"the work folder '{folder}' holds no run of rotq, but {foreign[0]}"
            f"{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}",
            hint="give an empty folder, or a new name, to --work-dir",
        )


def _check_same(kept: Recipe, recipe: Recipe, folder: Path) -> None:
    before, now = (dict(_settings(each, each.model_dump(mode="json"))) for each in (kept, recipe))
    changed = [
        key
        for key, value in before.items()
        if value != now[key] and Recipe.scope(key).fixed_by_work_dir
    ]
    if not changed:
        return

    key = changed[0]
    more = f" (and {len(changed) - 1} more: {', '.join(changed[1:])})" if len(changed) > 1 else ""
    raise OutputError(
        f"cannot resume in '{folder}': {key} was {before[key]} and is now {now[key]}{more}",
        hint="resume with the settings it was started with, or start in another --work-dir",
    )


def _settings(
    section: BaseModel, values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Every setting by its dotted key, as text. A mapping is one setting: one pattern more in
    ``overrides``, or two in another order, is another value of ``overrides``.

    Args:
        section: the recipe, or a section of it.
        values: its content as in a file.
        prefix: of its keys.
    """
    for name, field in section:
        if isinstance(field, BaseModel):
            yield from _settings(field, values[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _on_a_line(values[name])


def _on_a_line(value: Any) -> str:
    """A value as a recipe writes it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=2**31)
    return text.splitlines()[0]
