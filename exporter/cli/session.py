"""The surroundings of a run: who may write to stdout, which libraries may speak, and where the bars
are drawn.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import typer

from calib.process.progress import Progress, silent
from exporter.cli.errors import UsageError
from exporter.cli.options import TalkFlags
from exporter.cli.signals import hint_if_interrupted
from exporter.process import settle

OWN = ("exporter", "calib", "backends")


class _StderrHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at that moment: while a bar is up, that is rich's
    stand-in, which draws the line above the bar.
    """

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


class _OwnOrSevere(logging.Filter):
    """Lets rotq's own warnings through; of other libraries, nothing: what they report is not for a
    user to act on.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.split(".")[0] in OWN or record.levelno >= logging.CRITICAL


def set_up(talk: TalkFlags) -> None:
    """Configure logging and warnings for the rest of the process.

    Raises:
        UsageError: both ``-v`` and ``-q``.
    """
    if talk.verbose and talk.quiet:
        raise UsageError("-v/--verbose and -q/--quiet exclude each other", hint="give one of them")
    settle(talk.threads)

    handler = _StderrHandler()
    handler.setFormatter(
        logging.Formatter("%(levelname)s %(name)s: %(message)s" if talk.verbose else "%(message)s")
    )
    logging.getLogger().addHandler(handler)
    for name in OWN:
        level = logging.ERROR if talk.quiet else logging.INFO if talk.verbose else logging.WARNING
        logging.getLogger(name).setLevel(level)
    if talk.verbose:
        return

    handler.addFilter(_OwnOrSevere())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:  # -W and PYTHONWARNINGS are asked for, and win
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def running(
    talk: TalkFlags, work_dir: Path | None = None, *, light: bool = False
) -> Iterator[Progress]:
    """Surround the long part of a command: bars on, libraries quiet, stdout kept for the result.

    Libraries print to stdout as they like (torch.onnx.export does, and the native code of
    tokenizers); until the end of the block that is swallowed, or goes to stderr under ``-v``.

    Args:
        talk: how much is said.
        work_dir: what keeps whatever is finished, if the run is ended.
        light: whether processes of its own do the work, so that no library has to be quiet here.
    """
    if work_dir is not None:
        hint_if_interrupted(
            "what is finished is kept: add --resume to the same command, with --work-dir"
            f" {shlex.quote(str(work_dir))}, to go on from there"
        )
    with (
        Path(os.devnull).open("w") as nowhere,
        _native_stdout_to(2 if talk.verbose else nowhere.fileno()),
        contextlib.redirect_stdout(sys.stderr if talk.verbose else nowhere),
    ):
        if not talk.verbose and not light:
            _silence_libraries()
        with _shown(talk) as shown:
            if talk.json_events is None:
                yield shown
                return
            from exporter.console.events import Events

            with Events(talk.json_events, shown) as events:
                yield events


@contextlib.contextmanager
def _shown(talk: TalkFlags) -> Iterator[Progress]:
    """What people see of the progress."""
    if talk.quiet:
        yield silent
        return
    from exporter.console import ConsoleProgress, error_console

    with ConsoleProgress(error_console()) as progress:
        yield progress


@contextlib.contextmanager
def _native_stdout_to(descriptor: int) -> Iterator[None]:
    """Let what does not print through Python (descriptor 1) write to ``descriptor``."""
    sys.stdout.flush()
    try:
        own = os.dup(1)
        os.dup2(descriptor, 1)
    except OSError:  # the process was started without one of them
        yield
        return
    try:
        yield
    finally:
        try:
            _flush_c()
        finally:
            os.dup2(own, 1)
            os.close(own)


def _flush_c() -> None:
    """Write what C has buffered, which would come out when the process ends."""
    if sys.platform == "win32":  # it has no library that is the process itself
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)


def print_json(document: object) -> None:
    """Write the one JSON document of ``--json`` to stdout."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False, default=str))


def _silence_libraries() -> None:
    # torch and transformers install handlers of their own when they are imported, so they come
    # first. A command that gets here needs both anyway.
    import torch  # noqa: F401
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    for name in ("torch", "onnxscript", "onnx_ir", "modelopt", "nvidia-modelopt", "datasets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    hub_bars = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if hub_bars:
        # transformers takes the hub's bars down with its own, but a download of 15 GB must show
        # that it moves.
        enable_progress_bars()
