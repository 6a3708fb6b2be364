"""Errors that a user can act on.

Every failure rotq foresees is a :class:`RotqError`: one line that says what is wrong and why, and a
hint that says what to do about it. The command line prints exactly these two and exits with code 1;
anything else keeps its traceback.
"""

from __future__ import annotations


class RotqError(Exception):
    """A known failure.

    Args:
        message: what is wrong, naming the thing (file, tensor, key, layer) it is wrong with.
        hint: what to do about it; a command or a flag where there is one.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


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
