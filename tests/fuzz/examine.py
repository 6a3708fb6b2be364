"""One reader on one input: what came of it, watched for time, memory and code that runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calib.errors import RotqError

What = Literal["traceback", "hang", "code run", "memory"]
SENTINEL = "rotq-fuzz-code-ran"
"""Every payload makes a file or folder of this name, or says so to the shell."""
LONGEST_MESSAGE = 4000
MEMORY = 2**30
"""Bytes that a process may grow by, over one input of some kilobytes."""
IDLE = 0.01
"""Share of its time that what waits for something works at most."""
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
"""Audit events of another program being started; no reader of rotq starts one."""
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Unable to allocate")


class Hang(BaseException):
    """The time of one input is over; no Exception, so that no reader takes it for bad input."""


@dataclass(frozen=True)
class Failure:
    """What came of an input and should not have."""

    what: What
    where: str
    """The same for failures that are the same: the exception and the last line of rotq."""
    told: str
    """The traceback, or what else is known."""

    @property
    def key(self) -> str:
        """Short name of this failure, for a folder."""
        return hashlib.sha256(f"{self.what} {self.where}".encode()).hexdigest()[:10]


class _Watch:
    """What the audit hook has seen; a hook cannot be taken away again, so there is one."""

    def __init__(self) -> None:
        self.active = False
        self.seen = ""
        self._hooked = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        if not self._hooked:
            sys.addaudithook(self._hook)
            self._hooked = True
        self.active, self.seen = True, ""
        try:
            yield
        finally:
            self.active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in _STARTS:
            self.seen = event
        elif event in ("open", "os.mkdir") and SENTINEL in str(arguments[0]):
            self.seen = f"{event} of the payload"


_watch = _Watch()


def examine(
    read: Callable[[Path], object], folder: Path, *, seconds: int = 20, starts: bool = False
) -> Failure | None:
    """Call ``read(folder)``; what is wrong with how it ends, if anything is.

    Args:
        read: what is called; may return anything, and raise an error of rotq of one line.
        folder: the input.
        seconds: after which it hangs.
        starts: whether it may start programs (plugins are asked in a process of their own).
    """
    before, begun = _peak(), time.process_time()
    try:
        with _watch.watching(), _alarm(seconds), _silent():
            read(folder)
    except RotqError as error:
        found = _about_message(error)
    except Hang as error:
        found = Failure("hang", _place(error), _told(error))
    except MemoryError as error:
        found = Failure("memory", _place(error), _told(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found = Failure("traceback", f"{type(error).__name__} {_place(error)}", _told(error))
    else:
        found = None
    if _watch.seen and not (starts and _watch.seen == "subprocess.Popen"):
        return Failure("code run", _watch.seen, _watch.seen)
    if found is None and time.process_time() - begun > seconds:
        return Failure("hang", "in code that no signal ends", f"over {seconds} s")
    if found is None and _peak() - before > MEMORY:
        return Failure("memory", "the process grew", f"by {_peak() - before:,} bytes")
    return found


def limit_memory(nbytes: int) -> None:
    """Let this process take no more than ``nbytes`` beside what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _about_message(error: RotqError) -> Failure | None:
    message = error.message
    if any(words in message for words in _NO_MEMORY):
        return Failure("memory", _place(error), _told(error))
    if not message.strip() or "\n" in message or len(message) > LONGEST_MESSAGE:
        where = f"{type(error).__name__} of more than a line {_place(error)}"
        return Failure("traceback", where, _told(error))
    return None


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Rings where the block has worked, or waited and done nothing, for so long; on a machine that
    others use it may take longer.
    """
    begun = time.process_time()

    def ring(number: int, frame: object) -> None:
        used = time.process_time() - begun
        if used >= seconds or used < IDLE * seconds:
            raise Hang
        signal.alarm(seconds)

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _place(error: BaseException) -> str:
    """Module and function of rotq that the exception passed through last, or where it began."""
    root = str(Path(__file__).parents[2])
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(root)]
    own = [frame for frame in own if "/tests/" not in frame.filename] or own or list(frames)
    if not own:
        return "nowhere"
    return f"{own[-1].filename.removeprefix(root).lstrip('/')}:{own[-1].lineno}"


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-12))[-6000:]
