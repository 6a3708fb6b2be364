"""Folders that are damaged, and everything that opens one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from backends.base import Backend


def _largest(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def _truncate(folder: Path) -> None:
    path = _largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


DAMAGE: Mapping[str, Callable[[Path], None]] = {
    "empty": _empty,
    "truncated": _truncate,
    "missing": lambda folder: _largest(folder).unlink(),
}
"""What may happen to a folder; the largest file is the one with the weights."""


def openers(backend: Backend, folder: Path, target: str) -> dict[str, Callable[[], object]]:
    """Everything that opens what ``backend`` wrote for ``target``, by the name of its method."""
    return {
        "load": lambda: backend.load(folder, target, exact=True),
        "load_probed": lambda: backend.load_probed(folder, target),
        "read_linears": lambda: backend.read_linears(folder, target),
        "contents": lambda: backend.contents(folder, target),
    }
