"""Reports survive a round trip and are judged by their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from cli_support import sample_report
from pydantic import ValidationError

from exporter.reporting.report import REPORT_FILE, ParityRow, Report, parity_status


def row(passed: bool | None, rung: Literal[1, 2, 3] = 2, metric: str = "relative L2") -> ParityRow:
    return ParityRow(rung=rung, name="x", metric=metric, measured=0.1, bound=None, passed=passed)


def test_a_report_reads_back_equal(tmp_path: Path) -> None:
    report = sample_report()
    report.save(tmp_path)
    assert Report.load(tmp_path) == report


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    sample_report().save(tmp_path)
    content = json.loads((tmp_path / REPORT_FILE).read_text())
    (tmp_path / REPORT_FILE).write_text(json.dumps(content | {"verdict": "fine"}))
    with pytest.raises(ValidationError, match="verdict"):
        Report.load(tmp_path)


def test_a_figure_that_is_not_a_number_is_never_written(tmp_path: Path) -> None:
    gate = [row.model_copy(update={"kl": float("nan")}) for row in sample_report().gate]
    with pytest.raises(ValueError, match="not JSON compliant"):
        sample_report(gate=gate).save(tmp_path)
    assert not (tmp_path / REPORT_FILE).exists()


@pytest.mark.parametrize(
    ("judged", "status"),
    [
        ([], "unverified"),
        ([None], "unverified"),
        ([None, True], "passed"),
        ([True, False, None], "failed"),
    ],
)
def test_one_failed_row_fails_the_report(judged: list[bool | None], status: str) -> None:
    assert parity_status([row(passed) for passed in judged]) == status


def test_a_runtime_that_was_not_run_is_not_verified_by_what_torch_says() -> None:
    others = [row(True, 1), row(None, 2), row(True, 2, "unfused"), row(True, 3, "perplexity ratio")]
    assert parity_status(others) == "unverified"
    assert parity_status([*others, row(True)]) == "passed"
    assert parity_status([*others, row(False, 1)]) == "failed"
