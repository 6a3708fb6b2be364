"""Giving freed memory back to the operating system."""

from __future__ import annotations

import ctypes
import gc
import sys

_WORTHWHILE = 64 << 20
"""Bytes. Looking for garbage takes a quarter of a second in a process that has loaded transformers.
"""


def release_memory(freed: int) -> None:
    """Collect garbage, and on Linux hand back what the allocator keeps for later.

    glibc returns large allocations at once, but keeps what lies below a block still in use
    (``malloc_trim(3)``). Other C libraries have no such function, and keep little.

    Args:
        freed: bytes that were let go of; for a few nothing is done.
    """
    if freed < _WORTHWHILE:
        return
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
