"""The charts that commands draw into a file of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from calib.errors import OutputError
from exporter.cli.options import OUTPUT

_DRAWN = (".svg", ".png")


@dataclass(frozen=True)
class ChartFlag:
    """Where the chart goes."""

    chart: Annotated[
        Path | None,
        typer.Option(
            "--chart",
            metavar="FILE",
            help="Draw quality against size, as .svg or .png.",
            rich_help_panel=OUTPUT,
        ),
    ] = None


def check_chart(path: Path) -> None:
    """Refuse a file that cannot be drawn, before the long job.

    Raises:
        OutputError: it cannot be written so.
        BackendError: nothing can draw it.
    """
    from exporter.reporting.charts.style import check_matplotlib

    if path.suffix.lower() not in _DRAWN:
        raise OutputError(
            f"'{path}' is no kind of picture that can be drawn",
            hint=f"give a name that ends in {' or '.join(_DRAWN)} to --chart",
        )
    if not path.parent.is_dir():
        raise OutputError(f"the folder '{path.parent}' does not exist", hint="make it first")
    check_matplotlib()


def draw_compared(points: Sequence[tuple[str, float, int | None]], path: Path) -> None:
    """Quality against size.

    Args:
        points: name, perplexity and bytes of each.
        path: as :func:`check_chart` admits it.
    """
    from exporter.reporting.charts.compared import Point, compared_chart

    if not points:
        return
    drawn = compared_chart([Point(*each) for each in points])
    path.write_bytes(drawn.png() if path.suffix.lower() == ".png" else drawn.file())
