"""``rotq`` in forked children: Python and its libraries start once."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.faults.operations import Operations

_BROKE = 70


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Its exit code; minus the signal that killed it."""
    said: str
    """On stderr."""

    @property
    def killed(self) -> bool:
        """By a signal that no process can catch, or by the limit on the size of its files."""
        return self.code in (-signal.SIGKILL, -signal.SIGXFSZ)

    @property
    def errors(self) -> list[str]:
        """Its lines that say what went wrong."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def quiet_libraries() -> None:
    """What makes this process fit to be forked: one thread, no network."""
    import torch

    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}


def forked(run: Callable[[], int]) -> Ended:
    """Call ``run`` in a child, for its exit code. What it says goes through a pipe: a file of it
    would be cut off by a limit on the size of files.
    """
    reading, writing = os.pipe()
    with Path(os.devnull).open("wb") as nowhere:
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.dup2(nowhere.fileno(), 1)
            os.dup2(writing, 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)  # the old one may think that it can seek
            code = _BROKE
            try:
                code = run()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            text = said.read().decode(errors="replace")
        _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), text)


def rotq(
    arguments: Sequence[object],
    operations: Operations | None = None,
    *,
    most_bytes: int | None = None,
    dies: bool = False,
) -> Ended:
    """The command line in a child.

    Args:
        arguments: without the program's name.
        operations: watches it.
        most_bytes: the size that no file may have.
        dies: whether it is killed in the middle of the write that passes ``most_bytes``, in native
            code as well; else the write fails.
    """

    def run() -> int:
        from exporter.cli import main

        if most_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        if operations is not None:
            operations.watch()
        return main([str(argument) for argument in arguments])

    return forked(run)


def counted(arguments: Sequence[object], folder: Path) -> list[str]:
    """The operations below ``folder`` of a command that succeeds, in words. What it imports is
    imported here after it, so that no later child has to.
    """
    with tempfile.NamedTemporaryFile("r") as names, tempfile.NamedTemporaryFile("r") as modules:

        def run() -> int:
            from exporter.cli import main

            operations = Operations(folder)
            operations.watch()
            code = main([str(argument) for argument in arguments])
            Path(names.name).write_text("\n".join(operations.names))
            Path(modules.name).write_text("\n".join(sys.modules))
            return code

        ended = forked(run)
        if ended.code != 0:
            raise RuntimeError(f"{arguments} ended with {ended.code}: {ended.said}")
        for name in modules.read().splitlines():
            if name not in sys.modules:
                with suppress(Exception):
                    importlib.import_module(name)
        return names.read().splitlines()
