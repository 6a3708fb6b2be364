"""Printing what can be written: one table for each backend, and the reasons below it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from exporter.console.show import show_line, show_table
from exporter.reporting.summary import Table

if TYPE_CHECKING:
    from backends.registry import BackendInfo

Answers = Mapping[str, Mapping[str, str | None]]
Warnings = Mapping[str, Mapping[str, str]]


def show_backends(console: Console, backends: Iterable[BackendInfo]) -> None:
    """Print what each target takes. Reasons stand below, once each: several targets and schemes may
    share one.
    """
    for backend in backends:
        notes: dict[str, int] = {}
        show_table(console, _answers(backend, notes))
        for note, number in notes.items():
            show_line(console, f"({number}) {note}")


def _answers(backend: BackendInfo, notes: dict[str, int]) -> Table:
    """A row for each scheme, cache and rotation, a column for each target; numbers the reasons in
    ``notes``.
    """
    parts: tuple[tuple[str, Answers, Warnings], ...] = (
        ("{}", backend.schemes, backend.warnings),
        ("KV cache {}", backend.caches, {}),
        ("rotation {}", backend.rotations, backend.rotation_warnings),
    )
    rows = tuple(
        (
            words.format(name),
            *(
                _cell(answers[target][name], warnings.get(target, {}).get(name), notes)
                for target in backend.targets
            ),
        )
        for words, answers, warnings in parts
        for name in answers[backend.targets[0]]
    )
    title = (
        f"{backend.name} ({backend.distribution}), target {backend.targets[0]} unless --target"
        " names others"
    )
    return Table(title, ("", *backend.targets), rows)


def _cell(refusal: str | None, warning: str | None, notes: dict[str, int]) -> str:
    answer, note = ("yes", warning) if refusal is None else ("no", refusal)
    return answer if note is None else f"{answer} ({notes.setdefault(note, len(notes) + 1)})"
