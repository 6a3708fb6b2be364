"""The processor of this machine: what a runtime chooses its kernels and its precision by.
Torch-free."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
EXTENSIONS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""Those that runtimes have kernels for: products of integers, and floats of 16 bits. x86's names,
then ARM's."""


@cache
def cpu_name() -> str:
    """What the processor calls itself, or its architecture where it does not say."""
    return _described("model name") or platform.processor() or platform.machine()


@cache
def cpu_words() -> str:
    """Its name, and which of :data:`EXTENSIONS` it has: two that say the same run the same
    kernels."""
    have = set((_described("flags") or _described("Features")).split())
    found = ", ".join(name for name in EXTENSIONS if name in have)
    return f"{cpu_name()} ({found})" if found else cpu_name()


@cache
def _first() -> dict[str, str]:
    """What the system says of the first processor."""
    found: dict[str, str] = {}
    if not _CPUINFO.is_file():
        return found
    with _CPUINFO.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip() and found:
                break  # the next processor follows; a server has hundreds
            key, colon, value = line.partition(":")
            if colon:
                found[key.strip()] = value.strip()
    return found


def _described(key: str) -> str:
    return _first().get(key, "")
