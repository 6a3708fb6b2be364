"""How library code reports progress without printing: it calls a :class:`Progress`; the front door
draws the bar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Called once for every finished unit of work."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Report that ``done`` of ``total`` units (``None``: unknown) of the step named ``stage``
        are finished.
        """


def silent(stage: str, done: int, total: int | None) -> None:
    """The default :class:`Progress`: reports nothing."""


def track(items: Iterable[T], stage: str, total: int | None, progress: Progress) -> Iterator[T]:
    """Yield ``items``, reporting each one to ``progress`` once the caller is done with it."""
    progress(stage, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        progress(stage, done, total)
