"""One step of a sweep, in a process of its own: ``python -m exporter.sweeping.child export
RECIPE OUTPUT CAPTURE`` or ``... speed FOLDER``. It prints one JSON document as its last line.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calib.errors import RotqError
from exporter.process import settle

_PR_SET_PDEATHSIG = 1
_PROMPT, _WRITTEN = 32, 48
"""Tokens that are read, and written, to see how fast a runtime writes."""


def main(arguments: Sequence[str]) -> int:
    """Run the step; 1 with ``{"error": …}`` where it ends in a known failure."""
    _end_with_parent()
    settle(None)
    logging.disable(logging.CRITICAL)
    step, *rest = arguments
    steps: dict[str, Callable[..., dict[str, Any]]] = {"export": _export, "speed": _speed}
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            document = steps[step](*rest)
    except RotqError as error:
        hint = f"; {error.hint}" if error.hint else ""
        document = {"error": f"{error.message}{hint}"}
    sys.stdout.write(json.dumps(document) + "\n")
    return int("error" in document)


def _export(recipe: str, output: str, capture: str) -> dict[str, Any]:
    from exporter.commands.export import export
    from exporter.recipe import load_recipe
    from exporter.run.options import RunOptions

    options = RunOptions(Path(output), shared_capture=Path(capture))
    return {"status": export(load_recipe(recipe), options).report.status}


def _speed(folder: str) -> dict[str, Any]:
    """Tokens per second after the first, of the faster of two goes."""
    from exporter.commands.continuing import Continuing
    from exporter.commands.opened import opened

    model = opened(folder)
    positions = model.positions
    room = _WRITTEN if positions is None else min(_WRITTEN, positions - _PROMPT)
    if room < 2:
        return {"rate": None}
    rates = []
    for _ in range(2):
        running = Continuing(model.forward)
        ids = [1 + at % 7 for at in range(_PROMPT)]
        for _ in running.tokens(ids, lambda logits: int(logits.argmax()), room):
            pass
        rates.append(running.speed.rate or 0.0)
    return {"rate": max(rates) or None}


def _end_with_parent() -> None:
    """A sweep that is killed leaves no process behind (Linux; elsewhere they end by themselves)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended meanwhile
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
