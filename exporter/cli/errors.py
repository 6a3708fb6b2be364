"""Exit codes, and the one line that a known failure gets.

==== =====================================================================
code meaning
==== =====================================================================
0    done
1    known failure: ``error:`` and ``hint:`` on stderr, nothing written
2    wrong usage
3    exported, but parity failed: the folder is kept and marked failed
130  interrupted (SIGINT)
143  terminated (SIGTERM); 129: the terminal is gone (SIGHUP)
==== =====================================================================

Anything unforeseen keeps its traceback (Python exits with 1 then): it is a bug, and a bug report
needs it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable

import typer

from calib.errors import RotqError
from exporter.cli.signals import Received, signals_as_interrupts
from exporter.output import why_not_written

logger = logging.getLogger(__name__)

DONE, FAILED, USAGE, PARITY_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
_SIGNALLED = 128
"""What shells add to the number of the signal that ended a process."""

MEMORY_HINT = "lower --batch-size or --seqlen, choose a smaller model, or another --device"


class UsageError(Exception):
    """Options that are each valid but not together, or a value that only a table knows to be wrong.

    Args:
        message: what is wrong, naming the option.
        hint: what to give instead.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def exit_code_of(run: Callable[[], object]) -> int:
    """Run the application; turn how it ends into an exit code, and known failures into lines on
    stderr.
    """
    with signals_as_interrupts() as received:
        try:
            code = _ended(run, received)
        except KeyboardInterrupt:
            code = INTERRUPTED
        return _interrupted(received) if code == INTERRUPTED else _flush(code)


def _ended(run: Callable[[], object], received: Received) -> int:
    try:
        run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else (DONE if stop.code is None else FAILED)
    except UsageError as error:
        _say(error.message, error.hint)
        return USAGE
    except RotqError as error:
        _say(error.message, error.hint, error)
        return FAILED
    except MemoryError as error:
        _say("out of memory", MEMORY_HINT, error)
        return FAILED
    except Exception as error:
        if received.signal is not None:  # what else fails then, such as a terminal that has gone
            return INTERRUPTED
        known = _recognise(error)
        if known is None:
            raise
        _say(*known, error)
        return FAILED
    return DONE


def _recognise(error: Exception) -> tuple[str, str] | None:
    """Message and hint for failures of the machine, whose exception types belong to whichever
    library met them.
    """
    reason = why_not_written(error)
    if reason is not None:
        hint = "free some space, raise the limit, or choose another -o/--output or --work-dir"
        return reason, hint
    # torch's own types are not imported for this: the name is the same in all of its versions.
    if type(
        error
    ).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return "out of memory", MEMORY_HINT
    return None


def _say(message: str, hint: str | None, error: BaseException | None = None) -> None:
    if error is not None:
        logger.info("where it happened:", exc_info=error)  # shown under -v only
    _tell(f"error: {_one_line(message)}")
    if hint:
        _tell(f"hint: {_one_line(hint)}")


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody is left to read it; the exit code says the rest
        typer.echo(line, err=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _interrupted(received: Received) -> int:
    number = received.signal
    _tell("interrupted" if number is None else f"interrupted by {number.name}")
    if received.hint is not None:
        _tell(f"hint: {received.hint}")
    return INTERRUPTED if number is None else _SIGNALLED + number


def _flush(code: int) -> int:
    """``code``, unless stdout takes no more. If the reader of a pipe (``rotq backends | head -1``)
    has gone, there is nobody to tell.
    """
    if sys.stdout is None:
        return code
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more when it exits; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            _say(
                f"the result cannot be printed: {error.strerror}",
                "redirect stdout elsewhere; what was written to a folder is complete",
            )
            return code or FAILED
    return code
