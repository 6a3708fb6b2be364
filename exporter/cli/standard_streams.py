"""stdin, stdout and stderr of a process whose caller may have closed them."""

from __future__ import annotations

import contextlib
import os
import sys

_STANDARD = 3
"""Descriptors below this are the three."""


def stand_in_for_closed() -> bool:
    """Whether stdout is there; before the answer, the null device takes the place of whichever of
    the three streams is closed. A file of the run would else get its descriptor, and all that
    libraries print.
    """
    there = sys.stdout is not None
    if None in (sys.stdin, sys.stdout, sys.stderr):
        descriptor = os.open(os.devnull, os.O_RDWR)
        while descriptor < _STANDARD:
            descriptor = os.open(os.devnull, os.O_RDWR)
        os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # for as long as the process
    return there


def escape_what_cannot_be_encoded() -> None:
    """A file name that the terminal cannot encode must not kill a run at its summary."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
