"""Files and folders that are on the disk, not in the memory of the system alone, when a name begins
to stand for them.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Wait until the contents of a file are on the disk.

    Raises:
        OSError: they cannot be put there: the disk is full, or broken.
    """
    with path.open("rb+" if os.name == "nt" else "rb") as file:  # elsewhere it may be read-only
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk, where the system can say so: some file
    systems, and Windows, have no such call.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything below ``folder`` is on the disk; links are not followed.

    Raises:
        OSError: as :func:`sync_file`.
    """
    for inner, _, files in os.walk(folder):
        for name in files:
            path = Path(inner) / name
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        sync_folder(Path(inner))
