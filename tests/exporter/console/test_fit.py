"""Tables in the columns of a terminal: no word and no number is broken, and nothing is lost."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from cli_support import sample_report
from rich.console import Console

from exporter.cli import main
from exporter.console.fit import fitted, least_width, widths
from exporter.console.show import show_report, show_table
from exporter.console.terms import TERMS
from exporter.reporting.report import Remedy, RotationGateRow
from exporter.reporting.summary import Table, gate_table, parity_table, rotation_gate_table

FIGURES = tuple(
    f"{name}{when}" for name in ("damage", "input error", "kurtosis") for when in ("", " after")
)
STATS = Table(
    "Damage",
    ("linear", *FIGURES),
    tuple((f"model.layers.{layer}.self_attn.q_proj", *["1.0e-03"] * 6) for layer in (9, 10)),
    right=frozenset(range(1, 7)),
    marked=frozenset({1}),
)
REPORT = sample_report("failed")
TABLES = [
    STATS,
    parity_table(
        REPORT.model_copy(
            update={
                "parity": [
                    row.model_copy(update={"note": f"worst: model.layers.{index}.mlp.down_proj"})
                    for index, row in enumerate(REPORT.parity)
                ]
            }
        )
    ),
    gate_table(REPORT),
    rotation_gate_table(
        [
            RotationGateRow(
                rotation="R1", candidate=name, error=0.01, layers=[0.1, 0.2], measure="int8 inputs"
            )
            for name in ("identity", "pca-hadamard")
        ]
    ),
]


def shown(table: Table, width: int) -> str:
    stream = io.StringIO()
    show_table(Console(file=stream, width=width, highlight=False, markup=False), table)
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title.split(" ")[0])
def test_every_word_of_a_table_is_whole_and_every_line_fits(table: Table, width: int) -> None:
    text = shown(table, width)
    body = text.split("\n", 2)[2]
    words = set(re.split(r"\s+", body))
    expected = {
        word
        for row in (table.header, *table.rows)
        for cell in row
        for word in cell.split()
        if cell != "note"
    }
    assert {word for word in expected if not {word, f"{word}:", f"{word},"} & words} == set()
    tables = [line for line in body.splitlines() if not re.search(r": worst: ", line)]
    assert max(map(len, tables)) <= width


def test_a_table_that_fits_is_left_as_it_is_and_a_wider_one_keeps_its_first_column() -> None:
    assert fitted(STATS, 120) == ([STATS], [])
    parts, below = fitted(STATS, 80)
    assert len(parts) > 1
    assert below == []
    assert {part.header[0] for part in parts} == {"linear"}
    assert [name for part in parts for name in part.header[1:]] == list(STATS.header[1:])
    assert all(part.marked == STATS.marked for part in parts)
    assert all(index in part.right for part in parts for index in range(1, len(part.header)))
    assert all(least_width(part) <= 80 for part in parts)
    words = Table("x", ("one", "two"), (("a few words here", "and here"),))
    assert widths(words, 21) == [8, 8]  # two edges, and three characters between them


def test_the_verdict_is_the_first_line_and_commands_are_not_broken() -> None:
    remedy = Remedy(name="gptq", change={"weights.algorithm": "gptq"}, why="it " * 40, seconds=90)
    report = REPORT.model_copy(update={"remedies": [remedy]})
    stream = io.StringIO()
    terminal = Console(
        file=stream, width=60, force_terminal=True, color_system=None, highlight=False, markup=False
    )
    show_report(terminal, report, Path("out/a folder"))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("PARITY FAILED: do not deploy; ")
    command = "rotq export --recipe 'out/a folder/rotq.yaml' --weight-algorithm gptq"
    assert f"  {command} -o 'out/a folder-gptq'" in lines
    assert "about 1 min 30 s" in stream.getvalue()


@pytest.mark.usefixtures("clean_logging")
def test_a_term_is_explained_and_a_near_miss_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "Rung"]) == 0
    assert capsys.readouterr().out == f"rung: {TERMS['rung']}\n"
    assert main(["explain", "florr"]) == 2
    assert "did you mean 'floor'?" in capsys.readouterr().err
    assert main(["explain"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(TERMS)
    assert all(term == term.lower() for term in TERMS)
