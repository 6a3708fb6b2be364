"""What the C library does with memory that is freed.

glibc gives a large block back to the kernel as soon as it is free, and the next one comes as fresh
pages, each of which the kernel clears. Every elementwise result of ``[tokens, n]`` is such a block:
training a rotation spent half of its time on clearing pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator

_ASKED = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""What a user sets who knows better (mallopt(3))."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MOST_THRESHOLD = 32 * 2**20
"""The largest block that glibc comes to keep of its own accord, and the most it may be told."""
_MANY = 65536
_NEVER = 2**31 - 1
_WORTHWHILE = 64 * 2**20
"""Bytes. Looking for garbage takes a quarter of a second in a process that has loaded transformers.
"""


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Run a block, or as a decorator a function, that makes and drops the same large tensors over
    and over: what is freed stays with the process until its end, and goes back then.

    Only glibc can be told so, and only where the user's environment says nothing; elsewhere this
    does nothing.
    """
    library = None if any(name in os.environ for name in _ASKED) else _glibc()
    if library is None:
        yield
        return

    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        # where glibc itself ends up in a process that works with large blocks
        library.mallopt(_M_MMAP_MAX, _MANY)
        library.mallopt(_M_MMAP_THRESHOLD, _MOST_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _MOST_THRESHOLD)
        library.malloc_trim(0)


def give_back(freed: int) -> None:
    """Give the memory of what nobody needs any more to the system, before another model takes as
    much: of modules that refer to each other in a circle too, which Python frees some time later,
    and of what glibc keeps for later because it lies below a block still in use
    (``malloc_trim(3)``). Other C libraries have no such function, and keep little.

    Args:
        freed: bytes that were let go of; for a few nothing is done.
    """
    if freed < _WORTHWHILE:
        return
    gc.collect()
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
