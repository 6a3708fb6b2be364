"""``rotq rotate`` and ``--rotations`` on the command line, with the run replaced by a known
result.
"""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli_support import rotq, sample_report

from exporter.cli import main
from exporter.reporting.report import ParityRow, RotateReport, RotationGateRow


@dataclass(frozen=True)
class Result:
    output: Path
    report: RotateReport


def sample() -> RotateReport:
    exported = sample_report()
    measure = "held-out activations, int8"
    return RotateReport(
        model=exported.model,
        dtype="bfloat16",
        scheme="int8",
        rotate="r2",
        rotations=[rotation for rotation in exported.rotations if rotation.name.startswith("r2")],
        rotation_gate=[
            RotationGateRow(
                rotation="R1", candidate="identity", error=1e-4, measure=measure, chosen=True
            ),
            RotationGateRow(rotation="R1", candidate="trained", error=2e-4, measure=measure),
            RotationGateRow(
                rotation="R2",
                candidate="hadamard",
                error=3e-4,
                layers=[1e-4, 5e-4],
                measure=measure,
                chosen=True,
            ),
            RotationGateRow(
                rotation="R2", candidate="trained", error=6e-4, layers=[6e-4, 6e-4], measure=measure
            ),
        ],
        parity=[
            ParityRow(
                rung=1, name="rotated", metric="relative L2", measured=3e-7, bound=1e-5, passed=True
            )
        ],
        seconds={"train": 1.0},
        versions={"rotq": "0.1.0"},
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, clean_logging: None) -> list[dict[str, Any]]:
    """The arguments that the stand-in for :func:`exporter.commands.rotate.rotate` was called
    with.
    """
    seen: list[dict[str, Any]] = []

    def rotate(recipe: Any, options: Any, **rest: Any) -> Result:
        seen.append({"recipe": recipe, **rest})
        return Result(options.output, sample())

    module: Any = types.ModuleType("exporter.commands.rotate")
    module.rotate = rotate
    monkeypatch.setitem(sys.modules, "exporter.commands.rotate", module)
    monkeypatch.setattr("exporter.cli.session._silence_libraries", lambda: None)
    return seen


def test_options_reach_the_run(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    files = ["--rotations", "r1.pt", "--rotations", "r2.pt"]
    assert main(["rotate", *files, "--write-dartquant", "-q", "-o", str(tmp_path / "out")]) == 0
    assert main(["rotate", "--rotate", "r2", "-q", "-o", str(tmp_path / "out")]) == 0
    first, second = calls
    assert first["recipe"].rotation.files == ["r1.pt", "r2.pt"]
    assert first["write_dartquant"] is True
    assert (str(second["recipe"].rotate), second["recipe"].rotation.files) == ("r2", [])
    assert second["write_dartquant"] is False


def test_the_summary_says_what_was_kept_and_what_gained_nothing(
    calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rotate", "-o", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    for expected in (
        "R1 is left out: no rotation lowers this error",
        "training R2 gained nothing over hadamard: 2.00 x its error",
        "1.00e-04 to 5.00e-04",
        "computes what the original does",
    ):
        assert expected in out
    assert "rotate       r1,r2" in err  # what 'auto' means here
    assert "rotq export -m" in err


def test_json_is_the_report_and_the_folder(
    calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rotate", "--json", "-o", str(tmp_path / "out")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("output") == str(tmp_path / "out")
    assert RotateReport.model_validate(document) == sample()


def test_the_plan_of_a_rotation_quantizes_nothing() -> None:
    trained = json.loads(rotq("rotate", "--dry-run", "--json").stdout)
    given = json.loads(rotq("rotate", "--rotations", "r1.pt", "--dry-run", "--json").stdout)
    assert trained["quantized_parameters"] == 0
    assert trained["bytes_after"] == trained["bytes_before"]  # untied already, in its own dtype
    assert [stage["name"] for stage in trained["stages"]][-5:] == [
        "train R1",
        "train R2",
        "fuse",
        "write",
        "compare",
    ]
    assert [stage["name"] for stage in given["stages"]] == [
        "start",
        "load",
        "fuse",
        "write",
        "compare",
    ]
    assert "rotation_report.json" in trained["files"]
