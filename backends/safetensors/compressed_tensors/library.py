"""The compressed-tensors library: an optional dependency, imported when something of it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from calib.errors import BackendError

HINT = "pip install 'rotq[compressed-tensors]'"


def require(module: str) -> Any:
    """A module of the library.

    Raises:
        BackendError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != "compressed_tensors":
            raise  # something that the library itself needs
        raise BackendError(
            "targets in the compressed-tensors format need the compressed-tensors library, which is"
            " not installed",
            hint=HINT,
        ) from error
