"""``rotq report``: one page of all that is known of an exported folder, with charts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.output import replace_text
from exporter.recipe import Recipe
from exporter.reporting.charts.style import check_matplotlib
from exporter.reporting.exported import check_unchanged, read_export
from exporter.reporting.page_files import page_text, parts_of
from exporter.reporting.report import Report


@dataclass(frozen=True)
class ReportPage:
    """A report, and what is on its page beside it."""

    folder: Path
    report: Report
    recipe: Recipe
    parts: Mapping[str, int]
    """Bytes that are stored, by what they are."""

    def html(self) -> str:
        """The page.

        Raises:
            BackendError: matplotlib is not installed.
        """
        return page_text(self.report, self.recipe, self.folder, self.parts)

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "folder": str(self.folder),
            "export_sha256": self.report.export_sha256,
            "stored_bytes": dict(self.parts),
            "recipe": self.recipe.model_dump(mode="json"),
            **self.report.model_dump(mode="json"),
        }

    def _repr_html_(self) -> str:
        """For notebooks."""
        return self.html()


def report_page(folder: Path) -> ReportPage:
    """Read an exported folder.

    Raises:
        CheckpointError: it is incomplete, or not what was exported.
    """
    report, recipe = read_export(folder)
    check_unchanged(folder, report)
    return ReportPage(folder, report, recipe, parts_of(report, folder))


def write_report(folder: Path, output: Path) -> ReportPage:
    """Write the page of an exported folder to the file ``output``, in place of one that is there.

    Raises:
        BackendError: matplotlib is not installed.
        CheckpointError: the folder is incomplete, or not what was exported.
        OutputError: the page cannot be written.
    """
    check_matplotlib()
    page = report_page(folder)
    replace_text(output, page.html())
    return page
