"""Settings of a caller as values of a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping

from calib.errors import did_you_mean
from exporter.flags import RECIPE_KEYS


def keyed(settings: Mapping[str, object]) -> dict[str, object]:
    """Values by dotted key.

    Args:
        settings: values by the name of an option, with underscores.

    Raises:
        TypeError: there is no such option.
    """
    values: dict[str, object] = {}
    for name, value in settings.items():
        if name == "rotation_optimizer":
            values["rotation.r1.optimizer"] = values["rotation.r2.optimizer"] = value
        elif name in RECIPE_KEYS:
            values[RECIPE_KEYS[name]] = value
        else:
            raise TypeError(
                f"there is no setting '{name}'; {did_you_mean(name, RECIPE_KEYS)}"
                "rotq.load_recipe takes any other key of a recipe, as a mapping"
            )
    return values


def plain(values: Mapping[str, object]) -> dict[str, object]:
    """``values`` as a file would say them: paths are text, and ``None`` is left out.

    Args:
        values: by dotted key.
    """
    return {key: _plain(value) for key, value in values.items() if value is not None}


def _plain(value: object) -> object:
    match value:
        case os.PathLike():
            return os.fspath(value)
        case Mapping():
            return {key: _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
    return value
