"""Which candidate is taken, from tables of shares that decide either way."""

from __future__ import annotations

import itertools
import math

import pytest

from calib.arithmetic.noise import LEVEL, Sample, figure, margins, simplest

STUDENT_3, STUDENT_6 = 3.182446305284263, 2.4469118511449692
"""Quantiles 0.975 of Student's t with 3 and 6 degrees of freedom: 3.182 and 2.447 in printed
tables."""
HARD = (5.0, 1.0, 9.0, 2.0)
"""What units add for every candidate: some are harder than others by far more than candidates
differ."""


def shifted(*differences: float) -> list[Sample]:
    return [Sample([hard + own for hard, own in zip(HARD, differences, strict=True)])]


def test_differences_that_all_say_the_same_decide_however_small() -> None:
    found = margins({"simple": shifted(0.02, 0.01, 0.02, 0.01), "dear": shifted(0, 0, 0, 0)})
    assert found["simple"].value == pytest.approx(0.06)
    assert found["simple"].low > 0
    assert found["dear"].value == found["dear"].low == found["dear"].high == 0
    assert simplest(found) == "dear"


def test_differences_that_disagree_do_not_decide_and_the_simplest_is_taken() -> None:
    """The margin is the same as above."""
    found = margins({"simple": shifted(0.3, -0.2, 0.26, -0.3), "dear": shifted(0, 0, 0, 0)})
    assert found["simple"].value == pytest.approx(0.06)
    assert found["simple"].low < 0 < found["simple"].high
    assert simplest(found) == "simple"
    # the order of candidates says what is simple; their figures stay what they are
    assert simplest(dict(reversed(found.items()))) == "dear"


def test_the_interval_is_that_of_student() -> None:
    differences = (0.4, 0.1, 0.3, 0.2)
    found = margins({"a": shifted(*differences), "b": shifted(0, 0, 0, 0)})["a"]
    mean = sum(differences) / 4
    deviation = math.sqrt(sum((each - mean) ** 2 for each in differences) / 3)
    half = STUDENT_3 * deviation / math.sqrt(4)  # of the mean; four of these are the margin
    assert LEVEL == 0.95
    assert (found.low, found.high) == pytest.approx((4 * (mean - half), 4 * (mean + half)))


def test_a_gain_that_is_the_same_everywhere_is_no_noise_however_long_units_are() -> None:
    sizes = (10.0, 300.0, 20.0, 3.0)
    gained = Sample([0.1 * size for size in sizes], sizes)
    found = margins({"a": [gained], "b": [Sample([0.0] * 4, sizes)]})["a"]
    assert found.value == pytest.approx(0.1 * sum(sizes))
    # what is left is rounding: 4 products and quotients of values up to 30
    assert found.high - found.low == pytest.approx(0, abs=1e-13)
    equal = margins({"a": [Sample(gained.shares)], "b": [Sample([0.0] * 4)]})["a"]
    assert equal.low < 0  # of equal sizes one unit alone would make the figure


def test_an_edge_case_is_decided_by_which_side_zero_is_on() -> None:
    """``mean / (deviation / sqrt(m))`` just above Student's quantile, and just below."""
    for factor, taken in ((1.001, "dear"), (0.999, "simple")):
        mean = factor * STUDENT_3 / 2  # of differences whose deviation is 1
        spread = [mean + side * math.sqrt(3) / 2 for side in (1, -1, 1, -1)]
        found = margins({"simple": [Sample(spread)], "dear": [Sample([0.0] * 4)]})
        assert simplest(found) == taken


def test_ties_go_to_the_simplest() -> None:
    found = margins({name: shifted(0, 0, 0, 0) for name in ("simple", "dear", "dearest")})
    assert {margin.value for margin in found.values()} == {0.0}
    assert simplest(found) == "simple"


def test_one_unit_shows_no_noise_so_the_lowest_is_taken() -> None:
    found = margins({"simple": [Sample([1.01])], "dear": [Sample([1.0])]})
    assert found["simple"].low == found["simple"].high == pytest.approx(0.01)
    assert simplest(found) == "dear"
    assert simplest(margins({"simple": [Sample([1.0])], "dear": [Sample([1.0])]})) == "simple"


def test_variances_of_independent_samples_add() -> None:
    one, other = [0.4, 0.1, 0.3, 0.2], [0.6, 0.3, 0.5, 0.4]  # of one variance

    def half(shares: list[list[float]]) -> tuple[float, float]:
        zero = [Sample([0.0] * len(own)) for own in shares]
        found = margins({"a": [Sample(own) for own in shares], "b": zero})["a"]
        return found.value, (found.high - found.low) / 2

    (a, first), (b, second), (both, joint) = half([one]), half([other]), half([one, other])
    assert both == pytest.approx(a + b)
    assert first == pytest.approx(second)
    assert joint == pytest.approx(first * math.sqrt(2) * STUDENT_6 / STUDENT_3)
    # a sample that says nothing of noise adds none
    assert half([one, [0.7]])[1] == pytest.approx(first)


def test_nothing_hangs_on_the_order_of_units() -> None:
    differences = (0.1, 1e-17, -0.3, 1e16)
    found = {
        (margin.value, margin.low, margin.high)
        for order in itertools.permutations(differences)
        for margin in [margins({"a": [Sample(order)], "b": [Sample([0.0] * 4)]})["a"]]
    }
    assert len(found) == 1
    assert figure([Sample([1e16, 1.0, -1e16])]) == 1.0


def test_units_that_are_not_as_many_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        margins({"a": [Sample([1.0, 2.0])], "b": [Sample([1.0])]})
