"""A folder in which a run keeps what it has finished, so that a later run can go on from there.

It holds ``rotq.yaml``, what the inputs held (``inputs.json``), and one folder per finished step. A
resume with another setting, or from inputs that hold something else by now, is refused by name:
mixing steps of two runs would give a model that neither describes.

Figures that were dear to measure (:meth:`WorkDir.remembered`) are kept one by one, each in a sealed
file whose name is a digest of what it was measured on. What may change in a resume, such as the
target, may change that; then there is no such file, and it is measured anew.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel

from calib.errors import OutputError, RecipeError
from calib.files.sealed import DamagedError, read_sealed, seal_of, sealed_text
from exporter.output import HOLDER_FILE, LOCK_FILE, atomic_folder, is_partial, replace_text
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe
from exporter.run.contents import contents_of
from exporter.run.inputs import Inputs
from exporter.run.options import RunOptions

CAPTURE, ROTATIONS, ARTIFACT, WALK = "capture", "rotations", "artifact", "layerwise"
FUSED, GATE, PARITY = "fused", "gate", "parity"
CONTENTS = "inputs.json"
_PASSING = "passing"
_CONTENTS_VERSION = _FIGURES_VERSION = 1
_NAME_DIGITS = 32
"""Of a digest, in the name of a file: so many that no two things share one."""
Figures = TypeVar("Figures")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ELSEWHERE = "start in another --work-dir; what is in this one cannot be trusted"


class WorkDir:
    """The finished steps of a run in ``folder``; with ``folder`` ``None`` nothing is kept.

    Args:
        folder: of the run.
        recipe: of the run.
        resume: whether the folder may hold it already.
        contents: what the inputs hold (:func:`exporter.run.contents.contents_of`), by their names.

    Raises:
        OutputError: the folder holds another run and ``resume`` is not given, a setting or an input
            differs from that run's, or it holds files but no run.
    """

    @classmethod
    def of(cls, options: RunOptions, inputs: Inputs) -> WorkDir:
        """That of a run. What is kept was rounded to its dtype, whichever target decided it."""
        name = str(inputs.dtype).removeprefix("torch.")
        recipe = inputs.recipe.model_copy(update={"dtype": name})
        contents = {} if options.work_dir is None else contents_of(inputs, options)
        return cls(options.work_dir, recipe, resume=options.resume, contents=contents)

    def __init__(
        self,
        folder: Path | None,
        recipe: Recipe,
        *,
        resume: bool,
        contents: Mapping[str, str] | None = None,
    ) -> None:
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
            _check_contents(folder, contents or {})
            return

        folder.mkdir(parents=True, exist_ok=True)
        _check_empty(folder)
        # Whoever finds the recipe finds the other as well.
        replace_text(folder / CONTENTS, _sealed_contents(contents or {}))
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

    @contextmanager
    def passing(self) -> Iterator[Path]:
        """An empty folder for what is not kept, which vanishes with the block: in this one, or a
        temporary one.
        """
        if self.folder is None:
            with tempfile.TemporaryDirectory(prefix="rotq-") as temporary:
                yield Path(temporary)
            return
        self.remove(_PASSING)
        try:
            yield self.step(_PASSING)
        finally:
            self.remove(_PASSING)

    def keep(self, step: str, save: Callable[[Path], object]) -> None:
        """Keep a step: ``save(folder)`` writes it, and it appears whole or not at all."""
        if self.folder is not None:
            with atomic_folder(self.folder / step) as partial:
                save(partial)

    def remembered(
        self,
        step: str,
        of: Mapping[str, object],
        measure: Callable[[], Figures],
        worth_keeping: Callable[[Figures], bool] = lambda figures: True,
    ) -> Figures:
        """Figures that were kept, or what ``measure()`` gives now, which is kept.

        Args:
            step: what they belong to, by which their files are called.
            of: all that decides them beside recipe and inputs; what JSON can hold.
            measure: gives them; what JSON can hold, without tuples.
            worth_keeping: whether they will be the same another time.

        Raises:
            OutputError: the file of these figures is damaged.
        """
        if self.folder is None:
            return measure()
        path = self.folder / f"{step}-{seal_of(of)[:_NAME_DIGITS]}.json"
        if path.is_file():
            return cast(Figures, _read_figures(path, of))
        figures = measure()
        if not worth_keeping(figures):
            return figures
        values = {"format_version": _FIGURES_VERSION, "of": dict(of), "figures": figures}
        replace_text(path, sealed_text(values))
        return figures


def _read_figures(path: Path, of: Mapping[str, object]) -> object:
    """What :meth:`WorkDir.remembered` has kept."""
    try:
        values = read_sealed(path, lambda values: None)
        if values["of"] != json.loads(json.dumps(of)):
            raise DamagedError(f"{path.name} holds figures of something else")
        return values["figures"]
    except (DamagedError, KeyError, OSError) as error:
        raise OutputError(f"cannot resume in '{path.parent}': {error}", hint=_ELSEWHERE) from error


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
        hint=_ELSEWHERE,
    )


def _sealed_contents(contents: Mapping[str, str]) -> str:
    return sealed_text({"format_version": _CONTENTS_VERSION, "contents": dict(contents)})


def _check_contents(folder: Path, now: Mapping[str, str]) -> None:
    """Refuse inputs that hold something else than when the run in ``folder`` began."""
    try:
        before: dict[str, str] = read_sealed(folder / CONTENTS, lambda values: None)["contents"]
    except FileNotFoundError as error:
        raise OutputError(
            f"cannot resume in '{folder}': it has no {CONTENTS}, which older versions of rotq did"
            " not write: nothing says whether the inputs are the same",
            hint="start in another --work-dir",
        ) from error
    except (DamagedError, KeyError, OSError) as error:
        raise OutputError(f"cannot resume in '{folder}': {error}", hint=_ELSEWHERE) from error

    changed = sorted(
        name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
    )
    if not changed:
        return
    first = _change(changed[0], before.get(changed[0]), now.get(changed[0]))
    more = f" (and {len(changed) - 1} more: {', '.join(changed[1:])})" if len(changed) > 1 else ""
    raise OutputError(
        f"cannot resume in '{folder}': {first} since the run began{more}",
        hint="resume with the inputs it was started with, or start in another --work-dir",
    )


def _change(name: str, before: str | None, now: str | None) -> str:
    if before is None or now is None:
        return f"{name} was {'added' if before is None else 'taken away'}"
    if _DIGEST.fullmatch(before) or _DIGEST.fullmatch(now):
        return f"{name} changed"
    return f"{name} changed from {before} to {now}"


def _check_empty(folder: Path) -> None:
    """Refuse a folder of somebody else: steps would be read from it, and removed."""
    names = sorted(path.name for path in folder.iterdir())
    own = (LOCK_FILE, HOLDER_FILE, CONTENTS)  # the last of a run that was killed at its start
    foreign = [name for name in names if name not in own and not is_partial(name)]
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


def _on_a_line(value: object) -> str:
    """A value as a recipe writes it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=2**31)
    return text.splitlines()[0]
