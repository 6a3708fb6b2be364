"""Manifests that are edited and sealed anew, and files that are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib.files.sealed import write_sealed


def edit_sealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of a manifest; its seal, and those of the files that it lists, fit after
    it.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    files = [name for name in values.pop("files", ()) if (path.parent / name).is_file()]
    values.pop("sha256", None)
    change(values)
    write_sealed(path, values, files)


def flipped(data: bytes, index: int, bit: int = 0) -> bytes:
    """``data`` with one bit of one byte changed."""
    return data[:index] + bytes([data[index] ^ (1 << bit)]) + data[index + 1 :]
