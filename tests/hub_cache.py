"""Folders as the cache of the Hugging Face hub holds them: links to files that are named by their
own checksums.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def link_files(folder: Path, blobs: Path) -> Path:
    """Move every file of ``folder`` to the new folder ``blobs`` and leave a link; ``folder``."""
    blobs.mkdir()
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return folder


def is_sound(blobs: Path) -> bool:
    """Whether every file still has the checksum that is its name."""
    return all(
        hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in blobs.iterdir()
    )
