"""Requests to end: they all end a run as an interrupt does, with what is unfinished removed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
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
    try:
        yield received
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
