"""The user's folder of things that rotq need not do twice, and files in it that are whole or not
there. Torch-free."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from calib.files.reading import LARGEST, regular_file

_log = logging.getLogger(__name__)
_VARIABLE = "ROTQ_CACHE"
_DIGEST = hashlib.sha256().digest_size
_PARTIAL = ".partial"
_ABANDONED = 3600
"""Seconds after which nobody writes a partial file any more: an entry takes less than one."""


def cache_folder() -> Path:
    """``ROTQ_CACHE``, else ``rotq`` in the user's folder of caches."""
    if own := os.environ.get(_VARIABLE):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rotq"


def read_entry(path: Path, what: str) -> bytes | None:
    """What an entry holds; ``None`` where there is none, or one that does not fit its digest.

    Args:
        path: of the entry: a SHA-256 digest, then the data it is the digest of.
        what: it is, for the warning that it is made again.
    """
    try:
        if regular_file(path).stat().st_size > LARGEST:
            return None
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
        _log.warning("%s '%s' is damaged and is made again", what, path)
        return None
    with suppress(OSError):
        path.touch()  # the oldest go first
    return data[_DIGEST:]


def write_entry(path: Path, data: bytes, what: str, *, kept: int) -> None:
    """Write an entry, whole or not at all. A cache that cannot be written costs time and nothing
    else.

    Args:
        path: of the entry.
        data: what it shall hold.
        what: it is, for the warning that it cannot be kept.
        kept: entries of its suffix that stay in its folder; the oldest go.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=_PARTIAL)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s cannot be kept in '%s': %s", what, path.parent, error)
        return
    with suppress(OSError):  # another process may tidy up as well
        for left in path.parent.glob(f"*{_PARTIAL}"):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink(missing_ok=True)
        entries = sorted(
            path.parent.glob(f"*{path.suffix}"), key=lambda entry: entry.stat().st_mtime
        )
        for old in entries[:-kept]:
            old.unlink(missing_ok=True)
