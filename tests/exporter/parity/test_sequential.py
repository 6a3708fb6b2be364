"""Rung 3 stops where more rows cannot change the verdict, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from calib.errors import DataError
from calib.measure.perplexity import compare_logits
from exporter.parity.sequential import LEAST_ROWS, LEAST_TOKENS, Scores, score_until_settled

VOCABULARY, LENGTH = 16, 257
ROWS = list(torch.randint(VOCABULARY, (24, LENGTH), generator=torch.Generator().manual_seed(1)))


def original(ids: Tensor) -> Tensor:
    """Logits that depend on the token, another distribution for each."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return table[ids]


def colder(ids: Tensor) -> Tensor:
    return 1.2 * original(ids)


def scored(ratio: float, kl: float | None = None) -> Scores:
    return score_until_settled(original, colder, ROWS, ratio, kl)


@pytest.fixture(scope="module")
def everything() -> Scores:
    scores = Scores()
    for row in ROWS:
        scores.rows.append(compare_logits(original, colder, [row], window=LENGTH, stride=LENGTH))
    return scores


def test_figures_are_those_of_all_rows_together(everything: Scores) -> None:
    whole = compare_logits(original, colder, ROWS, window=LENGTH, stride=LENGTH)
    assert everything.kl.value == pytest.approx(whole.kl, rel=1e-12)
    assert everything.top1 == pytest.approx(whole.top1, rel=1e-12)
    assert everything.reference.value == pytest.approx(whole.reference.value, rel=1e-12)
    assert everything.candidate.value == pytest.approx(whole.candidate.value, rel=1e-12)
    assert everything.tokens == whole.reference.tokens


def test_the_interval_of_rows_of_one_length_is_students(everything: Scores) -> None:
    kls = torch.tensor([row.kl for row in everything.rows], dtype=torch.float64)
    # the quantile of a table, for 23 degrees of freedom and 99.9 %
    assert everything.kl.half == pytest.approx(3.7676 * float(kls.std()) / 24**0.5, rel=1e-4)


def test_it_stops_as_soon_as_the_verdict_is_clear_on_either_side(everything: Scores) -> None:
    for bound in (math.exp(everything.log_ratio.value + off) for off in (-1.0, 1.0)):
        found = scored(bound)
        assert len(found.rows) == max(LEAST_ROWS, -(-LEAST_TOKENS // (LENGTH - 1)))
        same_side = found.log_ratio.value < math.log(bound)
        assert same_side == (everything.log_ratio.value < math.log(bound))


def test_it_goes_on_to_the_last_row_where_a_bound_is_within_the_interval(
    everything: Scores,
) -> None:
    assert len(scored(math.exp(everything.log_ratio.value)).rows) == len(ROWS)
    clear = math.exp(everything.log_ratio.value + 1)
    assert len(scored(clear, everything.kl.value).rows) == len(ROWS)


def test_a_single_row_settles_nothing() -> None:
    one = Scores([compare_logits(original, colder, ROWS[:1], window=LENGTH, stride=LENGTH)])
    assert math.isinf(one.kl.half)
    assert not one.settled(100.0, None)


def test_rows_of_one_token_score_nothing() -> None:
    with pytest.raises(DataError, match="no token to score"):
        score_until_settled(original, colder, [torch.tensor([1])], 1.1, None)
