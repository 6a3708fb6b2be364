"""Files that are complete or absent, whenever the process is killed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from calib.errors import OutputError
from calib.files.durable import sync_file, sync_folder
from calib.files.sealed import digest


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file; the same tensors give the same bytes.

    Returns:
        The SHA-256 of the file.

    Raises:
        OutputError: the disk is full or the folder is not writable.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        _publish(partial, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return digest(path)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` in place of what ``path`` holds.

    Raises:
        OutputError: the disk is full or the folder is not writable.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        _publish(partial, path)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _publish(partial: Path, path: Path) -> None:
    """Rename, once the contents are on the disk: a name must never stand for less than the whole
    file.
    """
    sync_file(partial)
    partial.replace(path)
    sync_folder(path.parent)


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write '{path}': {error.strerror or error}",
        hint="check space and permissions, then --resume",
    )
