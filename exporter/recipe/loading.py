"""Recipes from files, presets and options.

Precedence: command-line flag > recipe file > preset > the defaults. An unknown key is an error,
never ignored.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from calib.errors import CheckpointError, RecipeError, did_you_mean
from calib.files.reading import bounded_text, reason_of
from exporter.recipe.schema import NEVER_IN_FILES, Recipe

LARGEST = 2**20
"""Bytes of a recipe."""


def presets() -> list[str]:
    """Names of the presets that ship with rotq."""
    folder = resources.files("exporter") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(
    source: str | PathLike[str] | None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Build the recipe of a run.

    Args:
        source: a YAML file, the name of a preset, or ``None`` for the defaults. A preset's name
            wins over a file's.
        overrides: values by dotted key (``{"calibration.nsamples": 64}``) that win over ``source``;
            ``None`` values are skipped.

    Raises:
        RecipeError: the source does not exist, is not YAML, or holds an unknown key, a value out of
            range, or what only the command line may say.
    """
    values = _read(source) if source is not None else {}
    for key in NEVER_IN_FILES:
        if values.pop(key, False) is not False:
            raise RecipeError(
                f"the recipe '{source}' says '{key}', which no file may decide",
                hint=f"remove the key; --{key.replace('_', '-')} on the command line says it",
            )
    for key, value in (overrides or {}).items():
        if value is not None:
            _assign(values, key, value)
    try:
        return Recipe.model_validate(values)
    except (ValidationError, UnicodeError) as error:
        raise RecipeError(
            _explain(error), hint="`rotq export --dry-run` prints a complete recipe with every key"
        ) from error


def with_values(recipe: Recipe, change: Mapping[str, Any]) -> Recipe:
    """``recipe`` with other values, by dotted key, checked as those of a file are. What nobody has
    said is decided anew.

    Raises:
        RecipeError: an unknown key, or a value out of range.
    """
    values = recipe.model_dump(exclude_unset=True)
    for key, value in change.items():
        _assign(values, key, value)
    try:
        return Recipe.model_validate(values)
    except (ValidationError, UnicodeError) as error:
        raise RecipeError(_explain(error)) from error


def recipe_of_artifact(values: Mapping[str, Any], run: Recipe, folder: Path) -> Recipe:
    """The recipe of writing an artifact again: what it was made by, but for the settings that it
    does not fix, which are those of the run.

    Args:
        values: the recipe in the artifact's provenance.
        run: the recipe of this run.
        folder: the artifact, for the message.

    Raises:
        CheckpointError: ``values`` is no recipe of this version.
    """
    try:
        recipe = Recipe.model_validate(dict(values))
    except (ValidationError, UnicodeError) as error:
        raise CheckpointError(
            f"the recipe in '{folder}' cannot be read: {_explain(error)}",
            hint="run `rotq calibrate` again",
        ) from error
    free = [key for key in Recipe.model_fields if not Recipe.scope(key).fixed_by_artifact]
    return recipe.model_copy(update={key: getattr(run, key) for key in free})


class _Loader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win, silently; a recipe must not. Nor may it repeat
    itself: a few hundred bytes of aliases of aliases hold gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: yaml.AliasEvent = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                problem=f"'*{event.anchor}' repeats a value; write it out",
                problem_mark=event.start_mark,  # type: ignore[arg-type]
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _read(source: str | PathLike[str]) -> dict[str, Any]:
    if str(source) in presets():
        text = (resources.files("exporter") / "presets" / f"{source}.yaml").read_text(
            encoding="utf-8"
        )
    else:
        try:
            text = bounded_text(Path(source), LARGEST)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"cannot read the recipe '{source}': {error}",
                hint=f"{did_you_mean(str(source), presets())}give a YAML file or one of the"
                f" presets: {', '.join(presets())}",
            ) from error

    try:
        values = yaml.load(text, _Loader)
    # a number, date or key that YAML reads and Python does not is none of YAML's errors
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise RecipeError(
            f"the recipe '{source}' is not valid YAML: {reason_of(error)}",
            hint="`rotq export --dry-run` prints a complete recipe",
        ) from error

    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(
            f"the recipe '{source}' must be a mapping of keys to values, not a"
            f" {type(values).__name__}"
        )
    return values


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"recipe key '{parent}' must be a mapping, not '{inner}'")
        values = inner
    values[leaf] = value


def _short(value: object) -> str:
    """``value`` in a message: Python refuses to spell integers of thousands of digits."""
    try:
        return reprlib.repr(value) if isinstance(value, dict | list) else repr(value)[:200]
    except ValueError:
        return "a number of thousands of digits"


def _explain(error: ValidationError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return f"the recipe holds characters that are no text: {reason_of(error)}"

    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown recipe key '{key}'")
        else:
            problems.append(
                f"recipe key '{key}': {item['msg'].removeprefix('Value error, ')} (got"
                f" {_short(item['input'])})"
            )
    return "; ".join(problems)
