"""Putting one folder in another's place, so that there is one at every moment."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def swap(new: Path, final: Path, old: Path) -> Path | None:
    """Move ``new`` to ``final``, in one step where the system can.

    Elsewhere what was at ``final`` is moved to ``old`` first, and a process that is killed in
    between leaves it there.

    Args:
        new: the folder that is to be seen.
        final: where; what is there steps aside, and comes back if ``new`` cannot be moved.
        old: a free name on the same file system.

    Returns:
        Where the folder that was at ``final`` is now; ``None`` where there was none.

    Raises:
        OSError: it cannot be moved; ``final`` is as it was.
    """
    if not final.exists():
        new.replace(final)
        return None
    if _exchange(new, final):
        return new
    try:
        final.replace(old)
        new.replace(final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Swap the two in one step; whether the system, and the file system, can."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # a C library without it
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))
