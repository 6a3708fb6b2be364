"""The page of a report as files of an exported folder, and two of its charts as pictures for the
card.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from backends.registry import get_backend
from exporter.recipe import Recipe
from exporter.reporting.card import PICTURES
from exporter.reporting.charts.choice import gate_chart, rotation_gate_chart
from exporter.reporting.charts.style import check_matplotlib
from exporter.reporting.charts.values import histogram_chart
from exporter.reporting.report import PAGE_FILE, Report
from exporter.reporting.stored import stored_bytes
from exporter.reporting.web_page import web_page

CHOICE_PICTURE, VALUES_PICTURE = PICTURES


def parts_of(report: Report, folder: Path) -> dict[str, int]:
    """Bytes that the folder stores, by what they are; the most first."""
    tensors = get_backend(report.backend).contents(folder, report.target)
    return {
        f"{part.kind}, {part.dtype}": part.nbytes for part in stored_bytes(tensors) if part.nbytes
    }


def page_text(
    report: Report, recipe: Recipe, folder: Path, parts: Mapping[str, int] | None = None
) -> str:
    """The page of what is in ``folder``, which is named as its reader should see it.

    Raises:
        BackendError: matplotlib is not installed.
    """
    check_matplotlib()
    return web_page(report, recipe, folder, parts_of(report, folder) if parts is None else parts)


def write_page_files(report: Report, recipe: Recipe, folder: Path, shown: Path) -> None:
    """Write the page, and the pictures that the card shows.

    Args:
        report: of the export in ``folder``, without checksums yet.
        recipe: what it was made by.
        folder: where it is being written.
        shown: where it will be.
    """
    page = page_text(report, recipe, shown, parts_of(report, folder))
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
    charts = {
        CHOICE_PICTURE: gate_chart(report.gate) or rotation_gate_chart(report.rotation_gate),
        VALUES_PICTURE: histogram_chart(report.evidence.inputs),
    }
    for name, chart in charts.items():
        if chart is not None:
            (folder / name).write_bytes(chart.png())
