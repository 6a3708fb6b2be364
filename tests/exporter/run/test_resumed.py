"""What was dear is not done twice: a run that ends in the gate, and then in parity, goes on from
what it has finished, and ends with the bytes of one that nothing has stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calib.errors import OutputError, RotationError
from calib.schemes import scheme_named
from exporter.commands.export import export
from exporter.parity import check
from exporter.recipe import Recipe, load_recipe
from exporter.reporting.report import Report
from exporter.run import rotations
from exporter.run.gate import Gate
from exporter.run.options import RunOptions
from exporter.run.rotations import load_trained
from exporter.run.workdir import ROTATIONS, WorkDir
from tests.checkpoints import write_checkpoint
from tests.torch_backend import install

TIMES = {"seconds", "cpu_seconds", "peak_bytes", "checksums"}


class Stopped(BaseException):
    """As a kill does, it passes whatever catches errors."""


def calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, stop_at: int = 0) -> list[object]:
    """Calls of a function from here on; it stops the run at number ``stop_at``."""
    seen: list[object] = []
    own: Callable[..., Any] = getattr(owner, name)

    def called(*arguments: Any, **settings: Any) -> Any:
        seen.append(arguments)
        if len(seen) == stop_at:
            raise Stopped
        return own(*arguments, **settings)

    monkeypatch.setattr(owner, name, called)
    return seen


def described(report: Report) -> dict[str, Any]:
    return report.model_dump(exclude=TIMES)


def test_a_resumed_run_does_nothing_dear_twice_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    install(tmp_path / "site", monkeypatch)
    monkeypatch.setattr("exporter.run.gate.MARGIN", 0.0)  # nothing is close enough: all are tried
    settings: dict[str, Any] = {
        "model": str(write_checkpoint(tmp_path / "model", num_hidden_layers=1)),
        "backend": "torch",
        "scheme": "int8-dynamic",  # without what the gate adds for static limits
        "calibration.nsamples": 4,
        "calibration.seqlen": 48,
        "gate.nsamples": 3,
        "evaluation.nsamples": 3,
        "rotation.r1.epochs": 2,
        "rotation.r2.epochs": 2,
    }
    recipe: Recipe = load_recipe(None, settings)
    whole = export(recipe, RunOptions(tmp_path / "whole")).report
    assert sum(row.kl is not None for row in whole.gate) == len(whole.gate) >= 4

    def resume() -> Report:
        options = RunOptions(tmp_path / "out", work_dir=tmp_path / "work", resume=True)
        return export(recipe, options).report

    with monkeypatch.context() as patch:
        calls(patch, Gate, "_measured", stop_at=3)
        with pytest.raises(Stopped):
            resume()
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        measured = calls(patch, Gate, "_measured")
        trained = calls(patch, rotations, "train_rotations")
        captured = calls(patch, rotations, "captured")
        calls(patch, check, "quality_rows", stop_at=1)
        with pytest.raises(Stopped):
            resume()
    assert (len(measured), trained, captured) == (len(whole.gate) - 2, [], [])
    with monkeypatch.context() as patch:
        proven = [calls(patch, check, name) for name in ("fold_rows", "runtime_rows")]
        judged = calls(patch, check, "quality_rows")
        measured = calls(patch, Gate, "_measured")
        report = resume()
    assert (proven, measured, len(judged)) == ([[], []], [], 1)
    assert described(report) == described(whole)
    assert report.export_sha256 == whole.export_sha256

    kept = tmp_path / "work" / ROTATIONS
    scheme = repr(scheme_named("int8-dynamic"))
    made_of = {"kinds": ["r1", "r2", "r4"], "prefix": [], "block": None, "scheme": scheme}
    assert load_trained(kept, made_of) is not None
    assert load_trained(kept, {**made_of, "scheme": scheme.replace("8", "4")}) is None
    assert load_trained(kept, {**made_of, "kinds": ["r1", "r2"]}) is None  # of another target
    (kept / "choice.json").write_text((kept / "choice.json").read_text().replace("R1", "R2"))
    with pytest.raises(RotationError, match=r"choice\.json is damaged or was edited") as caught:
        load_trained(kept, made_of)
    assert "another --work-dir" in str(caught.value.hint)


def test_figures_are_those_of_what_they_were_measured_on(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "work", Recipe(), resume=False)
    of = {"rows": "a", "setup": {"prefix": (1, 2)}}
    assert work.remembered("gate", of, lambda: [0.1]) == [0.1]
    again = WorkDir(tmp_path / "work", Recipe(), resume=True)
    assert again.remembered("gate", of, lambda: [0.2]) == [0.1]
    assert again.remembered("gate", {**of, "rows": "b"}, lambda: [0.3]) == [0.3]
    assert again.remembered("parity", {}, lambda: [0.4], lambda figures: False) == [0.4]
    assert again.remembered("parity", {}, lambda: [0.5]) == [0.5]  # it was not worth keeping

    nowhere = WorkDir(None, Recipe(), resume=False)
    assert [nowhere.remembered("gate", of, lambda v=v: v) for v in (1, 2)] == [1, 2]

    path = next((tmp_path / "work").glob("parity-*.json"))
    path.write_text(path.read_text().replace("0.5", "0.4"))
    with pytest.raises(OutputError, match=rf"{path.name} is damaged or was edited") as caught:
        again.remembered("parity", {}, lambda: [0.6])
    assert "another --work-dir" in str(caught.value.hint)
    other = next((tmp_path / "work").glob("gate-*.json"))
    other.replace(path)
    with pytest.raises(OutputError, match="holds figures of something else"):
        again.remembered("parity", {}, lambda: [0.6])
