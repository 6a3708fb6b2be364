"""Which files nobody put into a folder on purpose, by their names."""

from __future__ import annotations

from pathlib import PurePosixPath

from exporter.output.whole import is_partial

_LEFT_BY_PROGRAMS = frozenset({".ds_store", "thumbs.db", "desktop.ini", ".ipynb_checkpoints"})
"""Of file managers and notebooks, which make them anew; lower case, as not all systems tell."""


def is_disposable(name: str) -> bool:
    """Whether a path names what some program left and nobody misses: it goes with its folder."""
    path = PurePosixPath(name)
    return is_partial(path.name) or any(part.lower() in _LEFT_BY_PROGRAMS for part in path.parts)


def is_hidden(name: str) -> bool:
    """Whether a path names what is no part of an output: disposable, or hidden as ``.git`` and
    ``.cache`` are, which are not to be removed.
    """
    return is_disposable(name) or any(part.startswith(".") for part in PurePosixPath(name).parts)
