"""AdaRound: against all ways of rounding up or down, against rounding to nearest, and what it
refuses.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from weights_support import (
    FLOAT_SCHEMES,
    INTEGER_SCHEMES,
    correlated_moment,
    is_on_grid,
    random_weight,
)

from calib.arithmetic.grids import expand_grid, weight_grid
from calib.errors import QuantizationError
from calib.schemes import INT4, INT8, PerBlock, PerChannel, PerTensor, TensorScheme
from calib.weights.adaround import adaround
from calib.weights.clip import rtn
from calib.weights.rounded import output_error, row_errors

ITERATIONS = 300
"""Enough for a few dozen columns."""


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_correlated_inputs_lose_clearly_less(name: str, clip: bool) -> None:
    scheme, weight, moment = INTEGER_SCHEMES[name], random_weight(16, 40), correlated_moment(40)
    found = adaround(weight, moment, scheme, iterations=ITERATIONS, clip=clip)
    assert is_on_grid(found, scheme)
    assert output_error(weight, found.values(scheme), moment) < 0.7 * output_error(
        weight, rtn(weight, scheme).values(scheme), moment
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_weight_goes_up_or_down(symmetric: bool) -> None:
    """On the covering grid every value is one of the two next to the weight."""
    scheme, weight, moment = (
        TensorScheme(INT4, PerBlock(16), symmetric),
        random_weight(16, 40),
        correlated_moment(40),
    )
    found = adaround(weight, moment, scheme, iterations=ITERATIONS, clip=False)
    scale, _ = expand_grid(found.grid, weight.shape, scheme.granularity)
    steps = (found.values(scheme) - weight).abs() / scale
    # the zero point of an asymmetric grid is rounded, which may push its ends out of range by half
    # a step
    assert float(steps.max()) < (1 if symmetric else 1.5) + 1e-5
    assert float((steps > 0.5 + 1e-5).double().mean()) > 0.1
    assert torch.equal(found.grid.scale, weight_grid(weight, scheme).scale)


def test_six_columns_against_all_ways_up_or_down() -> None:
    """Never better than the best of the 64, which would be a wrong figure, and most often the
    best.
    """
    scheme, weight = TensorScheme(INT4, PerChannel(0)), random_weight(200, 6)
    moment = correlated_moment(6, decades=0.6)
    found = adaround(weight, moment, scheme, iterations=1000, clip=False)
    scale = found.grid.scale.double()[:, None]
    floor = (weight.double() / scale).floor()
    ways = torch.tensor(list(itertools.product((0, 1), repeat=6)), dtype=torch.float64)
    codes = (floor[:, None] + ways).clamp(-8, 7)
    difference = codes * scale[:, None] - weight.double()[:, None]
    best = torch.einsum("rci,ij,rcj->rc", difference, moment, difference).amin(dim=1)
    error, nearest = (
        row_errors(weight, each.values(scheme), moment) for each in (found, rtn(weight, scheme))
    )
    assert bool((error >= best * (1 - 1e-4)).all())
    # seen: 78 % of the rows are the best and 7 % more error in all; rounding to nearest 56 % and 25
    # %
    assert float((error <= best * (1 + 1e-4)).double().mean()) > 0.7
    assert float(error.sum()) < 1.1 * float(best.sum())
    assert float(nearest.sum()) > 1.2 * float(best.sum())


def test_uncorrelated_inputs_make_it_rtn() -> None:
    scheme, weight = TensorScheme(INT4, PerBlock(16)), random_weight(16, 40)
    found = adaround(weight, torch.eye(40), scheme, iterations=ITERATIONS, clip=False)
    assert torch.equal(found.stored, rtn(weight, scheme).stored)


@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_rows_never_get_worse_than_rtn(name: str) -> None:
    """Also when it was stopped before anything was decided, and with inputs that are mostly
    dead.
    """
    scheme, weight, moment = (
        INTEGER_SCHEMES[name],
        random_weight(16, 40) ** 3,
        correlated_moment(40, tokens=7),
    )
    moment[10:] = moment[:, 10:] = 0
    nearest = row_errors(weight, rtn(weight, scheme).values(scheme), moment)
    for iterations in (1, 40):
        error = row_errors(
            weight, adaround(weight, moment, scheme, iterations=iterations).values(scheme), moment
        )
        if error.shape == nearest.shape and "tensor" in name:
            error, nearest = error.sum(), nearest.sum()
        assert bool((error <= nearest * (1 + 1e-6)).all())


@pytest.mark.parametrize("name", ["int4-block", "int4-channel"])
def test_rows_do_not_depend_on_each_other_and_runs_repeat(name: str) -> None:
    """In one product of fewer rows the sums may come in another order, which a code on the edge may
    feel.
    """
    scheme, weight, moment = INTEGER_SCHEMES[name], random_weight(16, 40), correlated_moment(40)
    whole, again, part = (
        adaround(w, moment, scheme, iterations=ITERATIONS).stored
        for w in (weight, weight, weight[:5])
    )
    assert torch.equal(whole, again)
    assert float((whole[:5] == part).double().mean()) > 0.97


def test_units_do_not_matter() -> None:
    """Weights and inputs in other units, by powers of two: the same codes."""
    scheme, weight, moment = (
        TensorScheme(INT4, PerBlock(16)),
        random_weight(8, 40),
        correlated_moment(40),
    )
    one = adaround(weight, moment, scheme, iterations=ITERATIONS)
    other = adaround(weight / 1024, moment * 2**20, scheme, iterations=ITERATIONS)
    assert torch.equal(one.stored, other.stored)


@pytest.mark.parametrize("name", FLOAT_SCHEMES)
def test_floating_point_formats_are_refused(name: str) -> None:
    with pytest.raises(QuantizationError, match="AdaRound rounds to integers") as caught:
        adaround(random_weight(4, 32), torch.eye(32), FLOAT_SCHEMES[name])
    assert "gptq" in str(caught.value.hint)


def test_a_row_that_is_exact_stays_exact() -> None:
    """Multiples of the step, some of which come out below a whole number when divided by it; one
    scale for all rows.
    """
    scheme, weight = TensorScheme(INT8, PerTensor()), random_weight(4, 40)
    weight = weight / weight.abs().max() * 127 * 0.1
    grid = weight_grid(weight, scheme)
    weight[0] = torch.arange(-20, 20) * grid.scale
    assert bool(((weight[0] / grid.scale).floor() != torch.arange(-20, 20)).any())
    found = adaround(weight, correlated_moment(40), scheme, iterations=ITERATIONS, clip=False)
    assert torch.equal(found.stored[0].int(), torch.arange(-20, 20, dtype=torch.int32))
    assert not torch.equal(found.stored, rtn(weight, scheme).stored)
