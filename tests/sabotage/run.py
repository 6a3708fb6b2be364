"""Putting faults in, one after the other, and asking the checks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calib.errors import RotqError
from exporter.commands.export import calibrate, export
from exporter.commands.verify import verify
from exporter.recipe import load_recipe
from exporter.reporting.report import Report
from exporter.run.options import RunOptions
from tests.sabotage.artifact_faults import CALIBRATION, FLOATS
from tests.sabotage.base import Sabotage
from tests.sabotage.bundle_faults import BUNDLES
from tests.sabotage.folder_faults import FOLDERS, reseal
from tests.sabotage.onnx_faults import ONNX, SIDE_FILES
from tests.sabotage.setups import settings, write_models

LEAST = 0.95
"""Of all faults, caught at export, or by verify where a good folder was damaged."""
SABOTAGES = (*CALIBRATION, *FLOATS, *ONNX, *SIDE_FILES, *BUNDLES, *FOLDERS)


@dataclass(frozen=True)
class Verdict:
    """What a check said."""

    caught: bool
    by: str
    """Rung and name of the rows that failed, or the error; the status where nothing did."""
    status: str
    """``passed``, ``failed``, ``unverified`` or ``error``."""


@dataclass(frozen=True)
class Outcome:
    """What became of one sabotage."""

    sabotage: Sabotage
    exported: Verdict | None
    """``None`` where a good folder was damaged."""
    verified: Verdict | None
    """``None`` where the export left no folder."""

    @property
    def first(self) -> Verdict:
        """That of the export, or of verify where a good folder was damaged."""
        verdict = self.exported or self.verified
        assert verdict is not None
        return verdict

    @property
    def missed(self) -> bool:
        """Whether a check that was asked found nothing."""
        asked = [each for each in (self.exported, self.verified) if each is not None]
        return not all(each.caught for each in asked)

    @property
    def lifted(self) -> bool:
        """Whether verify called good what the export had called failed."""
        return (
            self.exported is not None
            and self.exported.status == "failed"
            and self.verified is not None
            and not self.verified.caught
        )


@dataclass
class Workshop:
    """A folder with the models and artifacts of the setups, made when they are first needed."""

    folder: Path
    _models: dict[str, Path] = field(default_factory=dict)

    def artifact(self, setup: str) -> Path:
        """The artifact of ``setup``, calibrated without a fault."""
        folder = self._place(setup) / "artifact"
        if not folder.is_dir():
            calibrate(load_recipe(None, self._settings(setup)), RunOptions(folder))
        return folder

    def good(self, setup: str) -> Path:
        """A folder of ``setup``, exported without a fault.

        Raises:
            AssertionError: it does not pass: nothing could be said of a fault.
        """
        folder = self._place(setup) / "good"
        if not folder.is_dir():
            report = self._export(setup, folder, calibrates=False)
            failed = [row for row in report.parity if row.passed is False]
            assert report.status == "passed", (setup, report.status, failed)
        return folder

    def run(self, sabotage: Sabotage) -> Outcome:
        """Export with the fault, or damage a good folder; then verify."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        if sabotage.damage is not None:
            shutil.copytree(self.good(sabotage.setup), out)
            sabotage.damage(out)
            reseal(out)
            return Outcome(sabotage, None, _asked(lambda: verify(out)))
        self.good(sabotage.setup)
        assert sabotage.patch is not None
        with sabotage.patch():
            exported = _asked(
                lambda: self._export(sabotage.setup, out, calibrates=sabotage.calibrates)
            )
            verified = _asked(lambda: verify(out)) if out.is_dir() else None
        return Outcome(sabotage, exported, verified)

    def _export(self, setup: str, out: Path, *, calibrates: bool) -> Report:
        artifact = None if calibrates else self.artifact(setup)
        recipe = load_recipe(None, self._settings(setup))
        return export(recipe, RunOptions(out, from_artifact=artifact)).report

    def _settings(self, setup: str) -> dict[str, object]:
        if not self._models:
            self._models.update(write_models(self.folder / "models"))
        return settings(setup, self._models)

    def _place(self, setup: str) -> Path:
        place = self.folder / setup.replace(" ", "-").replace(",", "")
        place.mkdir(parents=True, exist_ok=True)
        return place


def _asked(check: Callable[[], Report]) -> Verdict:
    try:
        report = check()
    except RotqError as error:
        return Verdict(True, f"error: {error.message}", "error")
    except Exception as error:  # no verdict of ours, but nobody takes the folder for good either
        return Verdict(True, f"crash: {type(error).__name__}: {error}", "error")
    failed = [
        f"{row.rung}: {row.name} ({row.metric})" for row in report.parity if row.passed is False
    ]
    return Verdict(report.status == "failed", "; ".join(failed) or report.status, report.status)


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each, and how many were caught."""
    lines = ["| setup | sabotage | at export | rotq verify |", "|---|---|---|---|"]
    for outcome in outcomes:
        verdicts = (outcome.exported, outcome.verified)
        words = ["-" if each is None else _words(each) for each in verdicts]
        if outcome.missed:
            words[-1] += f" ({outcome.sabotage.missed or 'not explained'})"
        sabotage = outcome.sabotage
        lines.append(
            f"| {sabotage.setup} | {sabotage.name}: {sabotage.what} | {' | '.join(words)} |"
        )
    return "\n".join([*lines, "", summary(outcomes)])


def _words(verdict: Verdict) -> str:
    return verdict.by[:160] if verdict.caught else f"MISSED, {verdict.status}"


def wrong(outcomes: Sequence[Outcome], *, whole: bool) -> list[str]:
    """The bars that ``outcomes`` miss, in words; the share is one of the ``whole`` suite."""
    caught = sum(each.first.caught for each in outcomes)
    found = [f"not explained: {each.sabotage.name}" for each in outcomes if _is_unexplained(each)]
    found += [f"lifted by verify: {each.sabotage.name}" for each in outcomes if each.lifted]
    if whole and caught < LEAST * len(outcomes):
        found.append(f"fewer than {LEAST:.0%} are caught")
    return found


def _is_unexplained(outcome: Outcome) -> bool:
    """Also where an explanation has become wrong."""
    return outcome.missed != bool(outcome.sabotage.missed)


def summary(outcomes: Sequence[Outcome]) -> str:
    """The last line of the table."""
    exported = [each.exported for each in outcomes if each.exported is not None]
    verified = [each.verified for each in outcomes if each.verified is not None]
    return (
        f"{sum(each.caught for each in exported)} of {len(exported)} caught at export;"
        f" {sum(each.caught for each in verified)} of {len(verified)} by rotq verify on the saved"
        f" folder; lifted from failed to passed: {sum(each.lifted for each in outcomes)}"
    )
