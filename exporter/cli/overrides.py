"""The recipe keys that options override."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from exporter.cli.errors import UsageError

RECIPE_KEYS = {
    "model": "model",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "ignore_unused": "ignore_unused",
    "device": "device",
    "dtype": "dtype",
    "backend": "backend",
    "target": "target",
    "logits": "logits",
    "kv_buffer": "kv_buffer",
    "max_shard_size": "max_shard_size",
    "scheme": "scheme",
    "kv": "kv",
    "override": "overrides",
    "block_size": "weights.block_size",
    "weight_algorithm": "weights.algorithm",
    "observer": "activations.observer",
    "smoothing": "smoothing",
    "prefix": "prefix",
    "overrides": "widen",
    "layerwise": "layerwise.enabled",
    "asym": "layerwise.asym",
    "max_memory": "layerwise.max_memory",
    "calib_dataset": "calibration.dataset",
    "calib_column": "calibration.column",
    "calib_layout": "calibration.layout",
    "nsamples": "calibration.nsamples",
    "seqlen": "calibration.seqlen",
    "batch_size": "calibration.batch_size",
    "eval_dataset": "evaluation.dataset",
    "eval_column": "evaluation.column",
    "seed": "seed",
    "rotate": "rotate",
    "r1_lr": "rotation.r1.lr",
    "r1_epochs": "rotation.r1.epochs",
    "r2_lr": "rotation.r2.lr",
    "r2_epochs": "rotation.r2.epochs",
    "rotations": "rotation.files",
}
"""Recipe key by field. ``rotation_optimizer`` sets two keys and is dealt with by :func:`overrides`.
"""


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
        raise UsageError(
            f"--override '{text}' is not PATTERN=SCHEME", hint="for example '*.down_proj=float'"
        )
    return pattern, scheme


def option_of(key: str) -> str:
    """The option that overrides the recipe key ``key``, for messages."""
    if key.endswith(".optimizer"):
        return "--rotation-optimizer"
    field = next(name for name, dotted in RECIPE_KEYS.items() if dotted == key)
    return "--" + field.replace("_", "-")
