"""Freed memory stays with the process while it is asked to, and goes back afterwards, or when that
is asked for.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from calib.process.memory import freed_memory_kept, give_back

NUMBERS = 2**24
"""Of a tensor of 64 MB, which glibc maps apart, and unmaps when it is freed, unless it is told
otherwise."""
BLOCK = 2**22
"""Bytes: few enough that glibc keeps them for the next block once it has seen a larger one
freed."""


class Mallinfo(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def info() -> Mallinfo:
    if not sys.platform.startswith("linux"):
        pytest.skip("glibc alone can be told so")
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        pytest.skip("this C library does not say what it keeps (glibc 2.33 does)")
    ask.restype = Mallinfo
    said: Mallinfo = ask()
    return said


def maps_apart() -> bool:
    """Whether a large tensor becomes a mapping of its own."""
    before = info().hblkhd
    tensor = torch.ones(NUMBERS)
    return bool(info().hblkhd - before >= tensor.nbytes)


def test_large_tensors_come_from_what_was_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    assert maps_apart()
    with freed_memory_kept():
        assert not maps_apart()
        assert info().fordblks >= 4 * NUMBERS  # free, and still the process's
    assert maps_apart()


def test_what_a_user_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    told = "calib.process.memory._glibc"
    monkeypatch.setattr(told, lambda: pytest.fail("the allocator was told"))
    with freed_memory_kept():
        pass


class _Circle(nn.Module):
    """Holds itself, as modules do whose forward was exchanged."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.own = self.forward
        self.blocks = [torch.ones(BLOCK // 4) for _ in range(blocks)]


def anonymous() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read in /proc")
def test_modules_in_a_circle_give_their_memory_back() -> None:
    give_back(50 * BLOCK)
    before = anonymous()
    model = _Circle(50)
    assert anonymous() - before >= 45 * BLOCK
    del model
    give_back(50 * BLOCK)
    assert anonymous() - before <= 5 * BLOCK
