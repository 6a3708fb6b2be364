"""``rotq sweep``: every combination once, side by side, and as if nothing had happened after a
kill.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_support import ROOT
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import BackendError, OutputError, RecipeError
from exporter.cli import main
from exporter.cli.sweep_command import EXAMPLES
from exporter.recipe import Recipe, load_recipe
from exporter.sweeping.points import PointResult, points_of, with_pareto
from exporter.sweeping.sweep import RESULTS_FILE, SweepOptions, read_sweep, sweep
from tests.checkpoints import write_checkpoint


def test_every_combination_is_a_point() -> None:
    grid = {"scheme": ["int8", "w4a8"], "rotate": ["none", "r1,r2"], "weights.block_size": ["32"]}
    points = points_of(Recipe(), grid)
    assert [point.name for point in points] == [
        "int8_none_32",
        "int8_r1-r2_32",
        "w4a8_none_32",
        "w4a8_r1-r2_32",
    ]
    assert [(point.recipe.scheme, str(point.recipe.rotate)) for point in points] == [
        ("int8", "none"),
        ("int8", "r1,r2"),
        ("w4a8", "none"),
        ("w4a8", "r1,r2"),
    ]
    assert {point.recipe.weights.block_size for point in points} == {32}


def test_points_that_may_train_are_known() -> None:
    """The first of them captures what all share; without one there is nothing to capture."""
    points = points_of(Recipe(), {"rotate": ["none", "r4", "r1", "r2,r4", "auto"]})
    assert [point.trains for point in points] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"scheme": ["int8", "int8"]}, "twice"),
        ({"seed": [str(at) for at in range(300)]}, "300 points"),
        ({"weights.block_size": ["many"]}, "block_size"),
    ],
)
def test_what_is_no_grid_is_refused(grid: dict[str, list[str]], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        points_of(Recipe(), grid)


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_the_front_is_what_nothing_beats(rows: list[tuple[int, int, int, bool]]) -> None:
    points = [
        PointResult(str(at), "failed" if bad else "passed", nbytes=size, perplexity=loss, rate=rate)
        for at, (size, loss, rate, bad) in enumerate(rows)
    ]
    able = [(size, loss, -rate) for size, loss, rate, bad in rows if not bad]
    for found, (size, loss, rate, bad) in zip(with_pareto(points), rows, strict=True):
        own = (size, loss, -rate)
        beaten = any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in able
        )
        assert found.pareto == (not bad and not beaten)


SETTINGS: dict[str, Any] = {
    "backend": "safetensors",
    "prefix": "none",
    "calibration.nsamples": 4,
    "calibration.seqlen": 32,
    "evaluation.nsamples": 2,
}
GRID = {"scheme": ["int8", "int8-weight-only"], "rotate": ["r1"]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    model = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    return load_recipe(None, {**SETTINGS, "model": str(model)})


SCRIPT = """
import sys
from pathlib import Path
from exporter.sweeping.sweep import SweepOptions, sweep
from exporter.recipe import load_recipe
grid = {"scheme": ["int8", "int8-weight-only"], "rotate": ["r1"]}
sweep(load_recipe(sys.argv[1]), grid, SweepOptions(Path(sys.argv[2]), jobs=1, speed=False))
"""


def test_a_sweep_that_was_killed_goes_on_to_equal_results(recipe: Recipe, tmp_path: Path) -> None:
    given = tmp_path / "recipe.yaml"
    given.write_text(recipe.to_yaml(), encoding="utf-8")
    output = tmp_path / "sweep"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(given), str(output)], env=environment
    )
    while process.poll() is None and not list(output.glob("points/*/report.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(OutputError, match="no finished sweep"):
        read_sweep(output)
    (kept,) = output.glob("points/*/report.json")
    before = kept.stat().st_mtime_ns

    with pytest.raises(OutputError, match="holds a sweep already"):
        sweep(recipe, GRID, SweepOptions(output, speed=False))
    with pytest.raises(OutputError, match="another grid"):
        sweep(recipe, {"scheme": ["int8"]}, SweepOptions(output, resume=True, speed=False))
    found = sweep(recipe, GRID, SweepOptions(output, resume=True, jobs=1, speed=False))
    assert kept.stat().st_mtime_ns == before

    whole = sweep(recipe, GRID, SweepOptions(tmp_path / "whole", jobs=1, speed=False))
    assert [dataclasses.asdict(point) for point in found.points] == [
        dataclasses.asdict(point) for point in whole.points
    ]
    assert len(whole.points) == 2
    assert all(point.perplexity and point.nbytes for point in whole.points)
    assert read_sweep(output).points == found.points
    for point in whole.points:
        one, other = (
            (folder / "points" / point.name / "model.safetensors").read_bytes()
            for folder in (output, tmp_path / "whole")
        )
        assert one == other


def test_a_point_that_is_refused_is_in_its_row_and_stops_no_other(
    recipe: Recipe, tmp_path: Path
) -> None:
    options = SweepOptions(tmp_path / "out", speed=False)
    found = sweep(recipe, {"scheme": ["mxfp4", "int8-weight-only"]}, options)
    refused, made = found.points
    assert refused.status == "error"
    assert "cannot express" in refused.error
    assert made.nbytes
    with pytest.raises(BackendError, match="cannot express"):
        sweep(recipe, {"scheme": ["mxfp4"]}, SweepOptions(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_the_command_refuses_what_it_cannot_sweep_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_logging: None
) -> None:
    for arguments, words in (
        ([], "nothing to sweep over"),
        (["--vary", "no.such=1"], "no recipe key"),
        (["--vary", "seed"], "has no values"),
    ):
        assert main(["sweep", *arguments, "-o", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert main(["sweep", "--schemes", "int8", "-o", str(tmp_path / "mine")]) == 1
    assert "holds no sweep" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_its_examples_are_grids(monkeypatch: pytest.MonkeyPatch, clean_logging: None) -> None:
    grids = []

    def stop(recipe: Recipe, grid: dict[str, list[str]], *rest: object, **more: object) -> None:
        grids.append(len(points_of(recipe, grid)))
        raise typer.Exit

    monkeypatch.setattr("exporter.sweeping.sweep.sweep", stop)
    for example in EXAMPLES:
        assert main(shlex.split(example)[1:]) == 0
    assert grids == [4, 6, 2]


def test_the_command_prints_a_table_and_keeps_it(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_logging: None
) -> None:
    given, output = tmp_path / "recipe.yaml", tmp_path / "out"
    given.write_text(recipe.to_yaml(), encoding="utf-8")
    arguments = ["sweep", "--recipe", str(given), "--schemes", "int8-weight-only", "--no-speed"]
    code = main([*arguments, "-o", str(output)])
    table = capsys.readouterr().out
    assert "int8-weight-only" in table
    points = json.loads((output / RESULTS_FILE).read_text())["points"]
    assert code == int(not any(point["pareto"] for point in points))
