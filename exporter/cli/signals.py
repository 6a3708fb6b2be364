"""Requests to end: they all end a run as an interrupt does, with what is unfinished removed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType

_NAMES = ("SIGTERM", "SIGHUP")
"""Beside SIGINT, which Python itself turns into a ``KeyboardInterrupt``. Not every system has
both.
"""


@dataclass
class Received:
    """The signal that has ended a run, if one has."""

    signal: signal.Signals | None = None
    hint: str | None = None
    """What whoever ended the run may do next."""


_CURRENT: ContextVar[Received | None] = ContextVar("received", default=None)


def hint_if_interrupted(hint: str) -> None:
    """From here on, say ``hint`` if the run is ended."""
    received = _CURRENT.get()
    if received is not None:
        received.hint = hint


def told_to_end() -> bool:
    """Whether it was no Ctrl-C that raised the last ``KeyboardInterrupt``, but a request to end."""
    received = _CURRENT.get()
    return received is not None and received.signal is not None


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[Received]:
    """Within the block, SIGTERM and SIGHUP raise ``KeyboardInterrupt``, and are noted.

    A signal that is ignored stays so (``nohup``), and so does a handler that somebody else has set.
    """
    received = Received()

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.signal = signal.Signals(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python sets handlers there alone
    changed = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, interrupt)
    token = _CURRENT.set(received)
    try:
        yield received
    finally:
        _CURRENT.reset(token)
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
