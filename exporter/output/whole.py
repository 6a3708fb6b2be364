"""Single files that hold the old text or the new one, whenever the process ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_PARTIAL = ".partial"


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` in place of what ``path`` holds. A link is replaced; what it points to stays
    as it is.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file of this name is what :func:`replace_text` leaves where it is killed."""
    return name.startswith(".") and name.endswith(_PARTIAL)
