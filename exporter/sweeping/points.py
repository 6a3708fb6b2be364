"""The points of a sweep: what each is called, and the recipe that it is. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from calib.errors import RecipeError
from calib.rotations.rotate import trainable
from exporter.recipe import Recipe, with_values
from exporter.reporting.summary import figure_words

MOST_POINTS = 256
"""More than that is most likely a mistake."""
_PLAIN = re.compile(r"[^A-Za-z0-9.+-]+")


@dataclass(frozen=True)
class Point:
    """One export of a sweep."""

    name: str
    """As its folder is called."""
    recipe: Recipe

    @property
    def trains(self) -> bool:
        """Whether rotations may be trained, on statistics that points share."""
        rotate = self.recipe.rotate
        return rotate.auto or bool(trainable(rotate.certain))


@dataclass(frozen=True)
class PointResult:
    """What an export gave, as far as it came."""

    name: str
    status: str
    """``passed``, ``failed`` or ``unverified``, of a report; ``error`` where there is none."""
    error: str = ""
    nbytes: int | None = None
    """Of the weights."""
    perplexity: float | None = None
    """Of the export, on the evaluation rows."""
    ratio: float | None = None
    """To the float model's."""
    kl: float | None = None
    rate: float | None = None
    """Tokens per second that the runtime writes, one sequence at a time."""
    pareto: bool = False
    """Whether no other point is at least as good in everything, and better in something."""

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        size = "-" if self.nbytes is None else f"{self.nbytes / 2**20:.1f}"
        figures = (self.perplexity, self.ratio, self.kl, self.rate)
        return (self.name, size, *map(figure_words, figures), self.error or self.status)


def points_of(recipe: Recipe, grid: Mapping[str, Sequence[str]]) -> list[Point]:
    """Every combination of a grid.

    Args:
        recipe: what all points have in common.
        grid: values by dotted recipe key.

    Raises:
        RecipeError: a value is none for its key, two points are the same, or there are too many.
    """
    keys = list(grid)
    names: dict[str, Recipe] = {}
    for values in itertools.product(*grid.values()):
        change = {key: _typed(value) for key, value in zip(keys, values, strict=True)}
        name = "_".join(_PLAIN.sub("-", value).strip("-") for value in values)
        if name in names:
            raise RecipeError(
                f"the sweep has the point '{name}' twice", hint="name each value once"
            )
        own = with_values(recipe, change)
        if len(own.targets) > 1:
            raise RecipeError(
                "a point of a sweep has one target",
                hint="give --target once, or --vary target=NAME,NAME",
            )
        names[name] = own

    if len(names) > MOST_POINTS:
        raise RecipeError(
            f"the sweep has {len(names)} points, and {MOST_POINTS} are the most",
            hint="sweep over fewer values at a time",
        )
    return [Point(name, own) for name, own in names.items()]


def _typed(value: str) -> object:
    """A number where it is one; everything else is a word."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def with_pareto(results: Iterable[PointResult]) -> list[PointResult]:
    """The results with :attr:`PointResult.pareto` filled in, of those that may be deployed: bytes
    and perplexity the lower the better, tokens per second the higher.
    """
    rows = list(results)
    able = [row for row in rows if row.status != "error" and row.status != "failed"]
    best = {row.name for row in able if not any(_dominates(other, row) for other in able)}
    return [replace(row, pareto=row.name in best) for row in rows]


def _dominates(one: PointResult, other: PointResult) -> bool:
    pairs = list(_comparable(one, other))
    return bool(pairs) and all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _comparable(one: PointResult, other: PointResult) -> Iterator[tuple[float, float]]:
    """What both know, as figures that are better the lower they are."""
    for a, b, sign in (
        (one.nbytes, other.nbytes, 1),
        (one.perplexity, other.perplexity, 1),
        (one.rate, other.rate, -1),
    ):
        if a is not None and b is not None:
            yield sign * a, sign * b
