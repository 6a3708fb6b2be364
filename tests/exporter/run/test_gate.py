"""The gate tries what costs more at run time only where nothing cheaper is close enough, and takes
the simplest of those it tried that are within noise of the best.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import pytest
import torch

from calib.data.rows import at_most
from calib.fusing import materialize
from calib.measure.perplexity import model_logits
from exporter.reporting.report import GateRow
from exporter.run.gate import MARGIN, Candidate, Gate, Setup
from exporter.run.stopwatch import Stopwatch
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, quantize_fused, token_rows

FUSED = fuse_tiny(make_tiny(CONFIGS["llama"]()))
SCHEMES = {"coarse": "w4a4", "finer": "int8", "finest": "int8-weight-only"}
SETUPS = (
    Setup("finest", online=True),
    Setup("coarse"),
    Setup("finer"),
    Setup("finest", wider=("a", "b")),
)
"""Not in the order of their costs, which are 1, 0, 0 and 3."""
ROWS = 4
"""Every step between the schemes is the same on all of them, far beyond their noise."""
TABLE = (
    Setup("none"),
    Setup("r1,r2", trained=True, kinds=2),
    Setup("r1,r2,r4", online=True, trained=True, kinds=3),
    Setup("r1,r2,r4, Hadamard", online=True, kinds=3),
)


def gate(bound: float) -> tuple[Gate, list[str]]:
    """A gate that has run, and what it tried in that order."""
    tried: list[str] = []

    def make(setup: Setup) -> Candidate:
        tried.append(str(setup))
        return Candidate(setup, FUSED, quantize_fused(FUSED, SCHEMES[setup.rotate]))

    own = Gate(make, model_logits(materialize(FUSED)), token_rows((32,) * ROWS, seed=9), bound)
    own.run(SETUPS)
    return own, tried


def test_nothing_dearer_is_tried_than_what_is_close_enough() -> None:
    own, tried = gate(bound=100.0)
    assert own.met
    assert tried == ["coarse", "finer"]  # of what costs the same all are
    assert own.chosen == own.candidate().setup == SETUPS[2]
    assert len(tried) == 2  # it was still in memory
    table = own.table()
    assert [(row.name, row.kl is None, row.chosen) for row in table] == [
        ("coarse", False, False),
        ("finer", False, True),
        ("finest", True, False),
        ("finest + 2 wider", True, False),
    ]
    assert own.enough == MARGIN * math.log(100.0)


def test_where_nothing_is_close_enough_all_are_tried() -> None:
    own, tried = gate(bound=1 + 1e-12)
    assert not own.met
    assert tried == ["coarse", "finer", "finest", "finest + 2 wider"]
    # of equals the one that costs less
    assert own.chosen == SETUPS[0]
    kls = [row.kl for row in own.table() if row.kl is not None]
    assert kls[0] > kls[1] > kls[2] == kls[3]


def test_some_rotations_are_compared_among_themselves() -> None:
    own, _ = gate(bound=1 + 1e-12)
    assert own.chosen_among(["coarse", "finer"]) == SETUPS[2]
    assert own.chosen_among(["finest"]) == SETUPS[0]
    assert gate(bound=100.0)[0].chosen_among(["finest"]) is None  # in the table, and not tried


def judged(kls: dict[Setup, list[float]], bound: float = 1 + 1e-12) -> Gate:
    """A gate that was told the KL of each candidate on each row; rows have 10 tokens and 30, in
    turn.
    """

    def told(setup: Setup, measure: object) -> GateRow:
        own = kls[setup]
        tokens = [(10, 30)[index % 2] for index in range(len(own))]
        kl = sum(map(operator.mul, own, tokens)) / sum(tokens)
        return setup.row().model_copy(
            update={"kl": kl, "row_kls": own, "row_tokens": tokens, "top1": 1.0}
        )

    def never(*arguments: object) -> Any:
        raise AssertionError("what is remembered is not made")

    own = Gate(never, never, [], bound, remember=told)
    own.run(list(kls))
    return own


def test_what_is_better_on_every_row_is_taken_and_what_is_not_is_noise() -> None:
    none, folded, online, plain = TABLE
    # r4 gains 0.1 on every row; with or without training is noise
    rows = {
        none: [1.00, 1.40, 0.90, 1.10],
        folded: [0.99, 1.42, 0.91, 1.07],
        online: [0.88, 1.31, 0.80, 1.00],
        plain: [0.91, 1.29, 0.81, 1.00],
    }
    own = judged(rows)
    assert own.chosen == plain
    by_name = {row.name: row for row in own.table()}
    lowest = by_name["r1,r2,r4, Hadamard"]
    assert (lowest.margin, lowest.margin_low, lowest.margin_high) == (0, 0, 0)
    trained = by_name["r1,r2,r4"]
    # the differences of rows, weighted by their tokens: (-0.03, 0.02, -0.01, 0) and 10, 30, 10, 30
    assert trained.margin == pytest.approx(0.2 / 80)
    assert trained.margin_low is not None
    assert trained.margin_low < 0
    assert by_name["none"].margin_low is not None
    assert by_name["none"].margin_low > 0
    assert [row.chosen for row in own.table()] == [False, False, False, True]

    # without the gain of R4 nothing is left that counts: the simplest is nothing at all
    same = judged(
        {setup: own if setup.online is False else rows[none] for setup, own in rows.items()}
    )
    assert same.chosen == none


def test_two_runs_whose_noise_differs_take_the_same() -> None:
    """As seen of 1 and 2 threads: the lowest KL is R4's in one run, R1's and R2's in the other."""
    none, folded, online, plain = TABLE
    base = [1.0, 1.2, 0.9, 1.1]
    one = {none: [0.4, 0.3, 0.5, 0.4], folded: [0.02, -0.01, 0.03, 0.01]}
    two = {none: [0.4, 0.3, 0.5, 0.4], folded: [-0.03, 0.01, -0.02, -0.01]}
    chosen = set()
    for noise in (one, two):
        rows = {
            setup: [a + b for a, b in zip(base, noise.get(setup, [0.0] * 4), strict=True)]
            for setup in (none, folded, online, plain)
        }
        lowest = min(rows, key=lambda setup, rows=rows: sum(rows[setup]))
        own = judged(rows)
        chosen.add((own.chosen, lowest))
    assert {choice for choice, _ in chosen} == {folded}
    assert len({lowest for _, lowest in chosen}) == 2


def test_what_is_close_enough_is_not_given_up_for_what_is_simpler() -> None:
    """Both are within noise of each other; one holds the bound on its own figure."""
    none, folded, _, _ = TABLE
    rows = {none: [0.012, 0.020, 0.004, 0.014], folded: [0.010, 0.006, 0.011, 0.007]}
    bound = math.exp(0.01 / MARGIN)
    own = judged(rows, bound)
    assert own.enough == pytest.approx(0.01)
    assert own.chosen == folded
    margin = own.table()[0].margin_low
    assert margin is not None
    assert margin < 0
    assert judged(rows, bound=math.exp(0.001)).chosen == none  # neither holds it


def test_one_row_shows_no_noise() -> None:
    none, folded, _, _ = TABLE
    assert judged({none: [1.001], folded: [1.0]}).chosen == folded
    assert judged({none: [1.0], folded: [1.0]}).chosen == none


def test_what_is_simple_is_said_in_this_order() -> None:
    """Each costs more than the one before, whatever else it spares."""
    ladder = [
        Setup("none"),
        Setup("none", norms_kept=True),
        Setup("r4", kinds=1),
        Setup("r1,r2, Hadamard", kinds=2),
        Setup("r2", trained=True, kinds=1),
        Setup("r1,r2", trained=True, kinds=2),
        Setup("none", smoothing="smoothquant:0.5"),
        Setup("none", (1,)),
        Setup("none", (1, 2)),
        Setup("r4", online=True, kinds=1),
        Setup("none", wider=("a",)),
        Setup("none", wider=("a", "b")),
        Setup("none", wider=("a", "b"), online=True),
    ]
    keys = [setup.simplicity for setup in ladder]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


def test_stages_carry_the_name_of_the_candidate() -> None:
    heard: list[str] = []

    def make(setup: Setup) -> Candidate:
        own.clock.progress("fuse", 1, 1)
        return Candidate(setup, FUSED, quantize_fused(FUSED, SCHEMES[setup.rotate]))

    own = Gate(
        make,
        model_logits(materialize(FUSED)),
        token_rows((8,), seed=9),
        1 + 1e-12,
        Stopwatch(lambda stage, done, total: heard.append(stage)),
    )
    own.run(SETUPS[:2])
    own.run([SETUPS[2]])
    assert [stage for stage in heard if stage != "gate"] == [
        "gate 1/2 coarse: fuse",
        "gate 2/2 finest: fuse",
        "gate 3/3 finer: fuse",
    ]


def test_a_smoothed_candidate_says_so_and_costs_nothing_more() -> None:
    plain = Setup("finest", online=True, prefix=(1,))
    smoothed = replace(plain, smoothing="smoothquant:0.5")
    assert smoothed.cost == plain.cost
    own, tried = gate(bound=1 + 1e-12)
    own.run([smoothed])
    assert tried[-1] == str(smoothed) == "finest + smoothquant:0.5 + prefix"
    assert own.table()[-1].name == str(smoothed)


def test_the_first_rows_that_have_so_many_tokens() -> None:
    rows = [torch.zeros(size) for size in (5, 3, 4)]
    assert [len(at_most(rows, tokens)) for tokens in (0, 1, 5, 6, 8, 9, 99)] == [
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
