"""The census runs where it is asked for (``-m census``), and prints its table in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

PROPERTY = "census"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Naming all types takes every config class of transformers, which no other run needs."""
    asked = config.option.markexpr == "census"
    return None if asked or collection_path.suffix != ".py" else True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each type."""
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.getreports(kind)]
    properties = [each for report in reports for each in report.user_properties]
    lines = sorted(str(value) for name, value in properties if name == PROPERTY)
    if not lines:
        return
    counted = {how: sum(f" {how} " in line for line in lines) for how in ("table", "generic")}
    terminalreporter.section("census")
    terminalreporter.write_line(
        "type, how, relative L2 of float and of int8-weight-only: prefill, decode, padded, chunks"
    )
    for line in lines:
        terminalreporter.write_line(line)
    words = ", ".join(f"{count} {how}" for how, count in counted.items())
    terminalreporter.write_line(f"{sum(counted.values())} of {len(lines)} exported: {words}")
