"""Reading files that somebody else may have written: bounded, and with every way in which they can
be wrong as one ``ValueError`` of one line. Imports nothing but the standard library.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

MALFORMED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,  # of torch; and RecursionError
)
"""What code raises that takes values of somebody else's for what they should be."""
_TELLS_LITTLE = (LookupError, TypeError, AttributeError, AssertionError, RecursionError)
"""Of these, the name says as much as the words."""

LARGEST = 2**28
"""Bytes of a JSON file. The index of a model of 1e12 parameters takes a tenth of it."""


def regular_file(path: Path) -> Path:
    """``path``, which a pipe or device could keep a reader waiting at for ever.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is no regular file.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        raise ValueError("it is no regular file")
    return path


def is_file_in(folder: Path, name: str) -> bool:
    """Whether ``name``, which somebody else wrote, is a file in ``folder`` itself: a name with
    folders in it would reach outside, and some names no file can have.
    """
    try:
        return Path(name).name == name and (folder / name).is_file()
    except (OSError, ValueError):
        return False


def check_size(path: Path, largest: int = LARGEST) -> None:
    """Refuse what is no regular file of at most ``largest`` bytes, before somebody else reads it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    size = regular_file(path).stat().st_size
    if size > largest:
        raise ValueError(f"{path.name} is larger than {largest:,} bytes")


def bounded_text(path: Path, largest: int) -> str:
    """The UTF-8 text of a regular file of at most ``largest`` bytes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    if regular_file(path).stat().st_size > largest:
        raise ValueError(f"it is larger than {largest:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from error


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is none, is nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it holds something else.
    """
    content = parse_json(bounded_text(path, LARGEST))
    if not isinstance(content, dict):
        raise ValueError(f"it holds no JSON object, but {type(content).__name__}")
    return content


def is_failure(error: BaseException) -> bool:
    """Whether the code of somebody else failed, as far as an exception tells: not because memory
    ran out, or because it was told to stop.
    """
    if type(error).__name__ == "PanicException":  # of Rust, which is no Exception
        return True
    return isinstance(error, Exception) and not isinstance(error, MemoryError)


def reason_of(error: BaseException, largest: int = 300) -> str:
    """What an exception of somebody else's says, in one line of at most ``largest`` characters."""
    try:
        words = " ".join(str(error).split())
    except Exception:  # not even that
        words = ""
    if not words or isinstance(error, _TELLS_LITTLE):
        words = f"{type(error).__name__}: {words}".removesuffix(": ")
    return words if len(words) <= largest else f"{words[:largest]}..."
