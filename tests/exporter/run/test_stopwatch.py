"""What stages take: each its own, and together what the run took."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from calib.errors import OutputError
from exporter.recipe import Recipe
from exporter.run.options import RunOptions
from exporter.run.reservation import check_paths
from exporter.run.stopwatch import Stopwatch, peak_resident

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read in /proc")
MEGABYTES = 2**20


def test_a_stage_inside_another_is_counted_once() -> None:
    clock = Stopwatch()
    began = time.perf_counter()
    with clock.stage("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with clock.stage("inner"):
                time.sleep(0.03)
    time.sleep(0.02)
    figures = clock.figures()["seconds"]
    took = time.perf_counter() - began
    assert figures["inner"] >= 0.06
    assert 0.02 <= figures["outer"] < 0.06
    assert figures["other"] >= 0.02
    assert sum(figures.values()) == pytest.approx(took, abs=0.01)


def test_a_stage_that_fails_leaves_the_watch_in_order() -> None:
    clock = Stopwatch()
    with clock.stage("outer"), pytest.raises(ValueError, match="no"), clock.stage("inner"):
        raise ValueError("no")
    assert list(clock.seconds) == ["outer"]


def test_a_copy_goes_on_by_itself() -> None:
    clock = Stopwatch()
    with clock.stage("both"):
        pass
    other = clock.copy()
    with other.stage("one"):
        pass
    assert list(clock.seconds) == ["both"]
    assert list(other.seconds) == ["both", "one"]
    before = clock.copy()
    clock.include(other, before)
    assert clock.seconds == other.seconds  # what both had taken is not counted twice


@linux
def test_the_peak_is_that_of_each_stage() -> None:
    clock = Stopwatch()
    size = 200 * MEGABYTES
    with clock.stage("outer"):
        with clock.stage("large"):
            torch.ones(size // 4)
        with clock.stage("small"):
            pass
    assert clock.peak_bytes["large"] >= clock.peak_bytes["small"] + size // 2
    assert clock.peak_bytes["outer"] >= clock.peak_bytes["large"]  # it held that stage
    resident = peak_resident()
    assert resident is not None
    assert resident > 0


@linux
def test_a_profile_is_of_the_whole_process_also_of_one_that_fails(tmp_path: Path) -> None:
    size = 100 * MEGABYTES

    def failing() -> None:
        clock = Stopwatch()
        with clock.profiled(tmp_path / "profile.json"):
            with clock.stage("large"):
                torch.ones(size // 4)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        failing()
    stages = json.loads((tmp_path / "profile.json").read_text())["stages"]
    assert list(stages) == ["start", "large", "other"]
    # it is made of pages, which the system counts: of 4 kB, or of 2 MB where it has them
    assert stages["large"]["faults"] >= size // (2 * MEGABYTES)
    assert stages["large"]["peak"] >= size
    assert 0 < stages["large"]["system"] <= stages["large"]["cpu"]
    # processors worked before the watch was started: python was, and torch was imported
    assert stages["start"]["cpu"] > 0.1
    assert stages["start"]["seconds"] > 0.1


def test_a_profile_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "profile.json"):
        options = RunOptions(tmp_path / "out", profile=path)
        with pytest.raises(OutputError, match="cannot be written"):
            check_paths(Recipe(), options)
