"""Giving back the memory that a memory-mapped tensor was read into.

Pages of a mapped file count as memory of the process for as long as the kernel sees no need for
them elsewhere. Writing a model reads all of it once, so without this a process that needs megabytes
would be seen to take as much as the model.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_LEAST_BYTES = 2**20
"""Smaller tensors are not worth a call."""
_MADV_PAGEOUT = 21
"""Linux's advice to reclaim pages now (madvise(2), since 5.4). It never loses data: pages of a file
are read again when they are used again, and memory that lies in no file stays, or goes to swap
where there is any."""


def release_pages(tensor: Tensor) -> None:
    """Let go of the pages of a contiguous CPU ``tensor``, whose values stay readable. Does nothing
    but on Linux.
    """
    if sys.platform != "linux" or tensor.nbytes < _LEAST_BYTES or not tensor.is_contiguous():
        return
    size = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // size) * size
    end = (tensor.data_ptr() + tensor.nbytes) // size * size
    # An older kernel refuses the advice, and that is all right.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_PAGEOUT)
