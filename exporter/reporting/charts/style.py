"""How every chart looks: one size, one palette, and colours that follow the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from calib.errors import BackendError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "pip install 'matplotlib>=3.10'"

BEFORE, AFTER, THIRD, BAD = "#d98324", "#3b82c4", "#2f9e6e", "#cc4b4b"
MUTED = "#8a8f98"
"""Seen on white as on black; charts tell series apart by marks or words as well."""
PALETTE = (AFTER, BEFORE, THIRD, "#8a6fc0", BAD, "#5aa7a7", "#b0883f", MUTED)

_INK = "#010203"
"""Stands for the colour of the page's text while matplotlib draws."""
_WIDTH, _DPI = 7.2, 150
_SIZES = re.compile(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', re.DOTALL)
_PREAMBLE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)


def check_matplotlib() -> None:
    """Refuse to go on without it, before a long job.

    Raises:
        BackendError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise BackendError("a report is drawn by matplotlib, which is missing", hint=INSTALL)


@dataclass(frozen=True)
class Chart:
    """One drawn figure."""

    name: str
    """Makes the ids in an SVG its own: several stand in one page."""
    words: str
    """What it shows, for those who cannot see it."""
    drawing: Figure

    def svg(self) -> str:
        """As an element of a page: as wide as it is given room, in the colour of its text."""
        text = self._saved("svg", transparent=True, metadata={"Date": None}).decode("utf-8")
        text = _METADATA.sub("", _PREAMBLE.sub("", text))
        text = _SIZES.sub(r"\1\2", text, count=1).replace(_INK, "currentColor")
        return text.replace("<svg", f'<svg role="img" aria-label="{escape(self.words)}"', 1).strip()

    def file(self) -> bytes:
        """As an SVG file of its own, on white."""
        own = self._saved("svg", facecolor="white", metadata={"Date": None})
        return own.replace(_INK.encode(), b"#000000")

    def png(self) -> bytes:
        """As a picture on white, for readers that show no SVG."""
        return self._saved("png", dpi=_DPI, facecolor="white", metadata={"Software": None})

    def _saved(self, kind: str, **options: Any) -> bytes:
        import matplotlib as mpl

        buffer = io.BytesIO()
        with mpl.rc_context(_settings(self.name)):
            self.drawing.savefig(buffer, format=kind, **options)
        return buffer.getvalue()


@contextmanager
def figure(
    name: str, words: str, height: float, columns: int = 1, rows: int = 1
) -> Iterator[tuple[Chart, list[Axes]]]:
    """A chart of the width of the page, in its style, to draw on within the block.

    Args:
        name: of the chart.
        words: what it shows.
        height: in inches, where the page is 7.2 wide.
        columns: of axes.
        rows: of axes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_settings(name)):
        drawing = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = list(drawing.subplots(rows, columns, squeeze=False).flat)
        yield Chart(name, words, drawing), axes


def _settings(name: str) -> Any:
    """Of matplotlib, whatever the user's own are."""
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        "svg.fonttype": "none",  # text stays text: small, and it can be searched
        "text.parse_math": False,  # names are names, whatever is in them
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.2,
        "grid.color": _INK,
        "legend.frameon": False,
        **dict.fromkeys(ink, _INK),
    }


def logarithmic(
    axes: Axes, which: Literal["x", "y"], values: Iterable[float], base: int = 10
) -> None:
    """Make an axis logarithmic where any of ``values`` can be shown so, its numbers as plain text:
    matplotlib's own are formulas, and nothing here is read as one.
    """
    if not any(value > 0 for value in values):
        return
    from matplotlib.ticker import LogFormatter

    scale, axis = (axes.set_xscale, axes.xaxis) if which == "x" else (axes.set_yscale, axes.yaxis)
    scale("log", base=base)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(base, labelOnlyBase=False, minor_thresholds=(1.5, 0.4)))
