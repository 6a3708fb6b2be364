"""Rounding to float formats: every value of the tables, every tie, and the scales of OCP's and
ModelOpt's rules.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.arithmetic.rounding import (
    E2M1_MAGNITUDES,
    decode,
    e8m0_exponent,
    encode,
    neighbours,
    round_e4m3_scale,
    round_to_format,
)
from calib.schemes import FLOAT4, FLOAT8, FORMATS, INT4, NumberFormat

# OCP MX specification 1.0, table 5: exponent bias 1, one mantissa bit, no infinities and no NaN.
E2M1_BY_BITS = {
    sign << 3 | exponent << 1 | mantissa: (-1) ** sign
    * (mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    for sign in (0, 1)
    for exponent in range(4)
    for mantissa in (0, 1)
}


def test_every_e2m1_code_stands_for_the_value_of_its_bits() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode(codes, FLOAT4)
    assert values.tolist() == [E2M1_BY_BITS[code] for code in range(16)]
    assert torch.equal(encode(values, FLOAT4), codes)  # -0.0 keeps its sign
    assert torch.equal(round_to_format(values, FLOAT4), values)


def test_every_e4m3_byte_that_is_a_number_survives() -> None:
    stored = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    values = stored.float()
    finite = values.isfinite()
    assert int(finite.sum()) == 254  # one NaN for each sign
    values = values[finite]
    assert torch.equal(round_to_format(values, FLOAT8), values)
    assert torch.equal(encode(values, FLOAT8).view(torch.uint8), stored[finite].view(torch.uint8))


@pytest.mark.parametrize(
    ("ratio", "rounded"),
    [
        (0.25, 0),
        (0.75, 1),
        (1.25, 1),
        (1.75, 2),
        (2.5, 2),
        (3.5, 4),
        (5.0, 4),
        (0.26, 0.5),
        (4.99, 4),
        (5.01, 6),
        (99, 6),
    ],
)
def test_e2m1_ties_go_to_the_even_code(ratio: float, rounded: float) -> None:
    both = torch.tensor([ratio, -ratio])
    assert round_to_format(both, FLOAT4).tolist() == [rounded, -rounded]


@given(st.floats(-1e4, 1e4, width=32), st.sampled_from(sorted(FORMATS)))
def test_no_representable_value_is_nearer(ratio: float, name: str) -> None:
    fmt: NumberFormat = FORMATS[name]
    if fmt.kind == "integer":
        table = torch.arange(fmt.qmin, fmt.qmax + 1)
    elif fmt.bits == 4:
        table = torch.tensor([*E2M1_MAGNITUDES, *(-value for value in E2M1_MAGNITUDES)])
    else:
        every = (
            torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
        )
        table = every[every.isfinite()]
    x = torch.tensor([ratio])
    found = round_to_format(x, fmt)
    assert bool((table == found).any())
    assert float((found - x).abs()) == float((table.double() - x.double()).abs().min())


@given(st.floats(1e-30, 1e30), st.sampled_from([FLOAT4, FLOAT8]))
def test_the_ceil_rule_clips_nothing_and_wastes_less_than_a_power_of_two(
    amax: float, fmt: NumberFormat
) -> None:
    exponent = int(e8m0_exponent(torch.tensor([amax], dtype=torch.float64), fmt, floor=False))
    assert amax <= 2.0**exponent * fmt.maxbound
    assert amax > 2.0 ** (exponent - 1) * fmt.maxbound


@given(st.floats(1e-30, 1e30), st.sampled_from([(FLOAT4, 2), (FLOAT8, 8)]))
def test_the_floor_rule_is_ocps(amax: float, case: tuple[NumberFormat, int]) -> None:
    fmt, emax = case  # the largest exponent of the element format
    exponent = int(e8m0_exponent(torch.tensor([amax], dtype=torch.float64), fmt, floor=True))
    assert exponent == math.frexp(amax)[1] - 1 - emax


@pytest.mark.parametrize("floor", [True, False])
def test_exponents_at_the_ends(floor: bool) -> None:
    amax = torch.tensor([0.0, 1e-45, 6.0, 3.4e38])
    low, tiny, six, huge = e8m0_exponent(amax, FLOAT4, floor=floor).tolist()
    # a dead block, one below the format's least scale, and exactly maxbound
    assert (low, tiny, six) == (-127, -127, 0)
    assert huge <= 127


def test_scales_in_e4m3_stay_positive_and_saturate() -> None:
    scales = torch.tensor([0.0, 1e-9, 2.0**-9, 1.0, 1.06, 1e9])
    assert round_e4m3_scale(scales).tolist() == [2.0**-9, 2.0**-9, 2.0**-9, 1.0, 1.0, 448.0]


def test_integers_clamp_before_they_are_stored() -> None:
    assert round_to_format(torch.tensor([-99.0, -8.5, 2.5, 3.5, 99.0]), INT4).tolist() == [
        -8,
        -8,
        2,
        4,
        7,
    ]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
def test_neighbours_are_the_next_representable_numbers(fmt: NumberFormat) -> None:
    steps = torch.linspace(fmt.qmin, fmt.qmax, 100_001)
    values = round_to_format(steps, fmt).unique_consecutive()  # every number but E4M3's subnormals
    below, above = neighbours(values, fmt)
    assert torch.equal(above[:-1], values[1:]) or fmt == FLOAT8
    assert torch.equal(neighbours(above[:-1], fmt)[0], values[:-1])
    assert torch.equal(round_to_format(below, fmt), below)
    assert bool((below[1:] < values[1:]).all())
    assert bool((above[:-1] > values[:-1]).all())
    # the ends have no further neighbour
    assert (float(below[0]), float(above[-1])) == (fmt.qmin, fmt.qmax)
