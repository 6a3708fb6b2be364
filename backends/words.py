"""Words for numbers."""

from __future__ import annotations


def size_words(count: int) -> str:
    """A number of bytes in decimal units: ``5 GB``, ``200 kB``."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:g} {unit}"
    return f"{count} bytes"
