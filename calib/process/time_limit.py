"""Ending code of others that takes too long. Torch-free."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator


class TooLongError(BaseException):
    """The time of a :func:`time_limit` is over; no Exception, which that code might catch."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let the block run for so many seconds at most.

    A signal ends it, as Ctrl-C does: sleeping, waiting and Python code, but not a call into native
    code before that returns. Threads other than the main one get no signals, and Windows has none;
    there the block takes as long as it takes.

    Raises:
        TooLongError: from whatever the block is doing then.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def end(number: int, frame: object) -> None:
        raise TooLongError(f"it takes longer than {seconds:g} seconds")

    begun, handler = time.monotonic(), signal.signal(signal.SIGALRM, end)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:  # the timer of whoever called
            left = max(remaining - (time.monotonic() - begun), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, interval)
