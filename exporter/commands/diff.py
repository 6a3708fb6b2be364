"""``rotq diff``: in what two exports differ, from what each says of itself. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exporter.reporting.exported import read_export
from exporter.reporting.report import ParityRow, Report
from exporter.reporting.summary import figure_words, human_bytes

_MISSING = "-"
_LONGEST = 60
"""Characters of a value that are shown."""


@dataclass(frozen=True)
class Changed:
    """One thing that is not the same in both; ``-`` where one has no such thing."""

    name: str
    first: str
    second: str


@dataclass(frozen=True)
class Differences:
    """In what two exports differ."""

    first: str
    second: str
    facts: tuple[Changed, ...] = ()
    """Model, target, scheme, sizes, versions."""
    recipe: tuple[Changed, ...] = ()
    """Settings, by dotted key."""
    rotations: tuple[Changed, ...] = ()
    figures: tuple[Changed, ...] = ()
    """Of the parity check."""
    kept: tuple[Changed, ...] = ()
    """Linears that only one of them leaves in float, with the reason."""
    numbers: tuple[str, ...] = ()
    """Linears, caches and float tensors whose stored numbers differ."""
    only_first: tuple[str, ...] = ()
    """Those that only the first has."""
    only_second: tuple[str, ...] = ()
    same_numbers: int = 0
    """How many have the same numbers in both."""
    files: tuple[Changed, ...] = field(default=())
    """SHA-256 of files, shortened."""

    @property
    def same(self) -> bool:
        """Whether the exported files are the same, byte by byte."""
        return not self.files

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"same": self.same, **asdict(self)}


def diff(first: Path, second: Path) -> Differences:
    """Compare two exported folders by their reports and recipes.

    Raises:
        CheckpointError: one is no complete export.
    """
    (one, one_recipe), (two, two_recipe) = read_export(first), read_export(second)
    numbers = [
        name for name in one.stored if two.stored.get(name, one.stored[name]) != one.stored[name]
    ]
    settings = [_flat(recipe.model_dump(mode="json")) for recipe in (one_recipe, two_recipe)]

    files = [{name: own[:12] for name, own in each.checksums.items()} for each in (one, two)]
    return Differences(
        first=str(first),
        second=str(second),
        facts=_changed(_facts(one), _facts(two)),
        recipe=_changed(*settings),
        rotations=_changed(_rotations(one), _rotations(two)),
        figures=_changed(_figures(one.parity), _figures(two.parity)),
        kept=_changed(_kept(one), _kept(two)),
        numbers=tuple(numbers),
        only_first=tuple(name for name in one.stored if name not in two.stored),
        only_second=tuple(name for name in two.stored if name not in one.stored),
        same_numbers=len(one.stored.keys() & two.stored.keys()) - len(numbers),
        files=_changed(*files),
    )


def _changed(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[Changed, ...]:
    names = dict.fromkeys((*first, *second))
    pairs = ((name, first.get(name, _MISSING), second.get(name, _MISSING)) for name in names)
    return tuple(Changed(name, one, other) for name, one, other in pairs if one != other)


def _facts(report: Report) -> dict[str, str]:
    chosen = next((row.name for row in report.gate if row.chosen), _MISSING)
    calibration = report.calibration
    return {
        "parity": report.status,
        "model": report.model.source,
        "source weights": report.model.fingerprint[:12],
        "backend": report.backend,
        "target": report.target,
        "scheme": report.scheme,
        "computes in": report.dtype,
        "rotate": report.rotate,
        "norms": "folded" if report.norms_folded else "kept",
        "chosen by the gate": chosen,
        "prefix": _MISSING if report.prefix is None else ", ".join(map(str, report.prefix.tokens)),
        "linears quantized": str(report.layers.quantized),
        "cache": report.layers.cache or "float",
        "bytes": human_bytes(report.layers.bytes_after),
        "calibration": f"{calibration.rows} rows, {calibration.tokens} tokens",
        "calibration text": f"{calibration.dataset} ({calibration.sha256[:12]})",
        "processor": report.cpu,
        **{f"version of {name}": number for name, number in report.versions.items()},
    }


def _rotations(report: Report) -> dict[str, str]:
    return {
        rotation.name: f"{rotation.order}, {'online' if rotation.online else 'folded'},"
        f" {rotation.origin}"
        for rotation in report.rotations
    }


def _figures(rows: Iterable[ParityRow]) -> dict[str, str]:
    return {
        f"{row.rung} {row.name}: {row.metric}": figure_words(row.measured)
        + {True: "", False: " FAIL", None: ""}[row.passed]
        for row in rows
    }


def _kept(report: Report) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.layers.kept}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted key."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            text = "none" if value is None else str(value)
            flat[prefix + key] = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    return flat
