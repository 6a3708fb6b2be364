"""The two consoles: results go to stdout, everything else to stderr.

rich honours NO_COLOR and drops colours where the stream is no terminal; what it does not do is fall
back to ASCII for a stream that cannot encode its line characters, nor leave long lines alone in a
pipe.
"""

from __future__ import annotations

import sys
from typing import TextIO

from rich import box
from rich.console import Console

PIPE_WIDTH = 160
"""Columns where nobody looks at a terminal: wide enough that a table row stays one line for grep.
"""


def output_console() -> Console:
    """Console on stdout."""
    return _console(sys.stdout)


def error_console() -> Console:
    """Console on stderr."""
    return _console(sys.stderr)


def speaks_unicode(console: Console) -> bool:
    """Whether the stream can encode more than ASCII."""
    return console.encoding.lower().replace("-", "").startswith("utf")


def table_box(console: Console) -> box.Box:
    """Lines for tables that the stream can encode."""
    return box.SIMPLE_HEAD if speaks_unicode(console) else box.ASCII2


def _console(stream: TextIO) -> Console:
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, emoji=False, markup=False)
