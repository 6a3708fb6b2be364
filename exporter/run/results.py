"""What an export gives back. Apart from the pipeline, so that whoever prints it need not import
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.recipe import Recipe
from exporter.reporting.html import page
from exporter.reporting.report import Report
from exporter.reporting.summary import gate_table, parity_table, seconds_table, verdict_line


@dataclass(frozen=True, repr=False)
class ExportResult:
    """What :func:`exporter.commands.export.export` made."""

    output: Path
    recipe: Recipe
    reports: Mapping[str, Report]
    """By target."""

    @property
    def report(self) -> Report:
        """That of the only target, or of the first."""
        return next(iter(self.reports.values()))

    @property
    def folders(self) -> dict[str, Path]:
        """Where each target's files are: ``output`` itself, or of several targets a folder of each
        one's name in it.
        """
        alone = len(self.reports) == 1
        return {target: self.output if alone else self.output / target for target in self.reports}

    def __repr__(self) -> str:
        return f"ExportResult({'; '.join(self._verdicts())})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        tables = []
        for report in self.reports.values():
            tables += [gate_table(report), parity_table(report), seconds_table(report)]
        facts = {
            "scheme": self.recipe.scheme,
            "rotate": self.report.rotate,
            "backend": self.recipe.backend,
            "targets": ", ".join(self.reports),
        }
        return page("; ".join(self._verdicts()), facts, tables)

    def _verdicts(self) -> list[str]:
        return [
            verdict_line(report, self.folders[target]) for target, report in self.reports.items()
        ]
