"""From options to the recipe keys that they override."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from exporter.cli.errors import UsageError
from exporter.flags import RECIPE_KEYS


def overrides(*groups: Any) -> dict[str, Any]:
    """The recipe values, by dotted key, that were given as options."""
    values: dict[str, Any] = {}
    for group in groups:
        for field in fields(group):
            value = getattr(group, field.name)
            if value is None or value is False or value == []:
                continue
            if field.name == "override":
                value = _patterns_and_schemes(value)
            elif field.name == "target":
                value = value[0] if len(value) == 1 else value
            elif field.name == "prefix" and value.isdecimal():
                value = int(value)
            elif isinstance(value, list):
                value = [str(item) for item in value]
            if field.name == "rotation_optimizer":
                values["rotation.r1.optimizer"] = values["rotation.r2.optimizer"] = value
            elif field.name in RECIPE_KEYS:
                values[RECIPE_KEYS[field.name]] = value
    return values


def _patterns_and_schemes(texts: list[str]) -> dict[str, str]:
    """In the order given; a pattern that is given twice stands where it was given last."""
    schemes: dict[str, str] = {}
    for text in texts:
        pattern, scheme = _pattern_and_scheme(text)
        schemes.pop(pattern, None)
        schemes[pattern] = scheme
    return schemes


def _pattern_and_scheme(text: str) -> tuple[str, str]:
    pattern, equals, scheme = text.rpartition("=")
    if not (pattern and equals and scheme):
        other = "--overrides takes auto or none; " if text in ("auto", "none") else ""
        raise UsageError(
            f"--override '{text}' is not PATTERN=SCHEME",
            hint=f"{other}for example '*.down_proj=float'",
        )
    return pattern, scheme
