"""Single files that hold the old text or the new one, whenever the process or the power ends."""

from __future__ import annotations

import contextlib
import glob
import os
from pathlib import Path

from calib.files.durable import sync_folder

_PARTIAL = ".partial"


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` in place of what ``path`` holds. A link is replaced; what it points to stays
    as it is. What killed processes of this machine left beside it goes.

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
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
            _sweep(path)


def _sweep(path: Path) -> None:
    """Remove the partial files of ``path`` whose processes have ended."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"):
        number = partial.name.removesuffix(_PARTIAL).rpartition(".")[2]
        if number.isdecimal() and not _runs(int(number)):
            partial.unlink(missing_ok=True)


def _runs(number: int) -> bool:
    """Whether a process of this number may be running here."""
    if os.name == "nt":  # where asking ends it
        return True
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of somebody else
        return True
    return True


def is_partial(name: str) -> bool:
    """Whether a file of this name is what :func:`replace_text` leaves where it is killed."""
    return name.startswith(".") and name.endswith(_PARTIAL)
