"""What an export gives back. Apart from the pipeline, so that whoever prints it need not import
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.recipe import Recipe
from exporter.reporting.report import Report


@dataclass(frozen=True)
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
