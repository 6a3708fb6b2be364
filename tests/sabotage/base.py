"""What a sabotage is, and the means of putting one in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Sabotage:
    """One fault."""

    name: str
    what: str
    """What it does, in a few words."""
    setup: str
    """A key of :data:`tests.sabotage.setups.SETUPS`: backend, target and scheme."""
    patch: Patch | None = None
    """Code that is wrong while it exports and verifies."""
    damage: Callable[[Path], None] | None = None
    """What is done to a good folder, whose checksums are made to fit after it."""
    calibrates: bool = False
    """Whether the fault is in what is before the artifact: it is then calibrated anew."""
    missed: str = ""
    """Why no check sees it, where none does."""


@contextmanager
def replaced(module: str, path: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block ``module.path`` (``Class.method`` too) is what ``wrap`` makes of it."""
    *outer, name = path.split(".")
    owner: Any = import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def result(module: str, path: str, change: Callable[[Any], Any]) -> Patch:
    """A patch: what ``module.path`` returns goes through ``change``."""

    def wrap(original: Any) -> Any:
        return lambda *args, **kwargs: change(original(*args, **kwargs))

    return lambda: replaced(module, path, wrap)


def arguments(module: str, path: str, change: Callable[..., tuple[Any, ...]]) -> Patch:
    """A patch: the positional arguments of ``module.path`` go through ``change``."""

    def wrap(original: Any) -> Any:
        return lambda *args, **kwargs: original(*change(*args), **kwargs)

    return lambda: replaced(module, path, wrap)


def both(*patches: Patch) -> Patch:
    """Several patches at once: writer and reader, say."""

    @contextmanager
    def within() -> Iterator[None]:
        if not patches:
            yield
            return
        with patches[0](), both(*patches[1:])():
            yield

    return within
