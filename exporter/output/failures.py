"""What the system says when it takes no more bytes, whoever was told."""

from __future__ import annotations

import errno
import os

_FULL = "the disk is full"
_REASONS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "a file is larger than this process may write (ulimit -f)",
}


def why_not_written(error: BaseException) -> str | None:
    """In words, that ``error``, or what caused it, came of a full disk or a limit on files;
    ``None`` where it came of something else.

    Writers in native code (safetensors, torch) raise their own exception types, which carry the
    system's message only.
    """
    cause: BaseException | None = error
    while cause is not None:
        for code, reason in _REASONS.items():
            own = isinstance(cause, OSError) and cause.errno == code
            if own or os.strerror(code) in str(cause):
                return reason
        cause = cause.__cause__
    return None
