"""Errors that a user can act on.

Every failure rotq foresees is a :class:`RotqError`: one line that says what is wrong and why, and a
hint that says what to do about it. The command line prints exactly these two and exits with code 1;
anything else keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 3000
"""Characters of a message; what is in the middle of a longer one is left out."""


class RotqError(Exception):
    """A known failure.

    Args:
        message: what is wrong, naming the thing (file, tensor, key, layer) it is wrong with. Names
            that somebody else gave may have line breaks, or be of any length: it becomes one line.
        hint: what to do about it; a command or a flag where there is one.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = _one_line(message)
        super().__init__(self.message)
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # what tracebacks and notebooks show below the message


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean 'gptq'? `` for ``gtpq``, to stand before a list of what is ``known``; empty
    where nothing is called much the same.
    """
    import difflib

    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"did you mean '{close[0]}'? " if close else ""


def _one_line(message: str) -> str:
    line = " ".join(message.splitlines())
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


class CheckpointError(RotqError):
    """A model folder or artifact that cannot be read: missing, incomplete, corrupt, or holding NaN
    or Inf.
    """


class UnsupportedModelError(RotqError):
    """An architecture, or a feature of one, that rotq refuses to rotate or to quantize."""


class DataError(RotqError):
    """Calibration or evaluation text that is missing, empty or too short."""


class RotationError(RotqError):
    """A rotation of the wrong shape, one that is not orthogonal, or one that cannot be trained."""


class QuantizationError(RotqError):
    """A scheme or statistic from which no valid scale follows."""


class NotFiniteError(QuantizationError):
    """NaN or Inf where calibration counts something."""


class BackendError(RotqError):
    """Something that a backend or its runtime cannot express or refuses to load."""


class OutputError(RotqError):
    """An output folder that exists already or cannot be written."""


class RecipeError(RotqError):
    """An unknown recipe key, or a value that no run can use."""
