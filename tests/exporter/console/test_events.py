"""Progress for machines: what was reported, in order, whatever ends the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calib.errors import OutputError
from calib.process.progress import silent
from exporter.cli import main
from exporter.console.events import Events


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_first_and_last_of_every_stage_are_there(tmp_path: Path) -> None:
    path, passed_on = tmp_path / "events.jsonl", []
    with Events(path, lambda *report: passed_on.append(report)) as events:
        for done in range(101):
            events("capture", done, 100)
        events("write", 0, None)
        events("capture", 0, 2)  # once more
        events("capture", 2, 2)
    begin, *progress, end = lines(path)
    assert begin["event"] == "begin"
    assert (end["event"], end["ok"]) == ("end", True)
    reported = [(each["stage"], each["done"], each["total"]) for each in progress]
    assert reported[0] == ("capture", 0, 100)
    assert ("capture", 100, 100) in reported
    assert reported[-3:] == [("write", 0, None), ("capture", 0, 2), ("capture", 2, 2)]
    assert len(reported) < 100  # not each of a hundred within no time
    assert len(passed_on) == 104


def test_what_ends_a_run_is_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def run() -> None:
        with Events(path, silent) as events:
            events("capture", 0, 1)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run()
    end = lines(path)[-1]
    assert (end["event"], end["ok"], end["error"]) == ("end", False, "broken")


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--json-events") as caught:
        Events(tmp_path / "no" / "events.jsonl", silent)
    assert "No such file" in caught.value.message


def test_a_command_writes_them_beside_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_logging: None
) -> None:
    path = tmp_path / "events.jsonl"
    arguments = ["eval", "embedded", "--nsamples", "2", "--json", "--json-events", str(path)]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    stages = {each.get("stage") for each in lines(path)}
    assert "eval" in stages
