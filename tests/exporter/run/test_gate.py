"""The gate tries what costs more at run time only where nothing cheaper is close enough, and keeps
the lowest KL of what it tried.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from calib.data.rows import at_most
from calib.fusing import materialize
from calib.measure.perplexity import model_logits
from calib.progress import silent
from exporter.run.gate import MARGIN, Candidate, Gate, Setup
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


def gate(bound: float) -> tuple[Gate, list[str]]:
    """A gate that has run, and what it tried in that order."""
    tried: list[str] = []

    def make(setup: Setup) -> Candidate:
        tried.append(str(setup))
        return Candidate(setup, FUSED, quantize_fused(FUSED, SCHEMES[setup.rotate]))

    own = Gate(make, model_logits(materialize(FUSED)), token_rows((32,) * 2, seed=9), bound)
    own.run(SETUPS, silent)
    return own, tried


def test_nothing_dearer_is_tried_than_what_is_close_enough() -> None:
    own, tried = gate(bound=100.0)
    assert own.met
    assert tried == ["coarse", "finer"]  # of what costs the same all are
    assert own.best.setup == SETUPS[2]
    table = own.table()
    assert [(row.name, row.kl is None, row.chosen) for row in table] == [
        ("coarse", False, False),
        ("finer", False, True),
        ("finest", True, False),
        ("finest + 2 wider", True, False),
    ]
    assert own.enough == MARGIN * math.log(100.0)


def test_where_nothing_is_close_enough_the_lowest_wins() -> None:
    own, tried = gate(bound=1 + 1e-12)
    assert not own.met
    assert tried == ["coarse", "finer", "finest", "finest + 2 wider"]
    # of equals the one that costs less
    assert own.best.setup == SETUPS[0]
    kls = [row.kl for row in own.table() if row.kl is not None]
    assert kls[0] > kls[1] > kls[2] == kls[3]


def test_the_lowest_of_some_rotations_is_among_those_that_were_tried() -> None:
    own, _ = gate(bound=1 + 1e-12)
    assert own.lowest(["coarse", "finer"]) == SETUPS[2]
    assert own.lowest(["finest"]) == SETUPS[0]  # of equals the first
    assert gate(bound=100.0)[0].lowest(["finest"]) is None  # in the table, and not tried


def test_a_smoothed_candidate_says_so_and_costs_nothing_more() -> None:
    plain = Setup("finest", online=True, prefix=(1,))
    smoothed = replace(plain, smoothing="smoothquant:0.5")
    assert smoothed.cost == plain.cost
    own, tried = gate(bound=1 + 1e-12)
    own.run([smoothed], silent)
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
