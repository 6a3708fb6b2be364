"""Scales: the identities that define them, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.arithmetic.scales import compute_scale, convert_to_scale
from calib.errors import QuantizationError
from calib.schemes import FORMATS
from tests.tolerances import rounded_once

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-2, 6e4), min_size=1, max_size=8),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(FORMATS)),
)
def test_scale_times_maxbound_is_amax(values: list[float], dtype: torch.dtype, fmt: str) -> None:
    amax = torch.tensor(values, dtype=torch.float64)
    maxbound = FORMATS[fmt].maxbound
    scale = convert_to_scale(amax, maxbound, dtype=dtype)
    assert scale.dtype == dtype
    assert scale.shape == amax.squeeze().shape
    normal = amax.squeeze() / maxbound >= torch.finfo(dtype).tiny
    back = scale.double() * maxbound
    assert bool(
        ((back - amax.squeeze()).abs() <= rounded_once(dtype) * amax.squeeze())[normal].all()
    )
    assert bool((scale > 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amax", [0.0, 1e-300])
def test_a_dead_channel_gets_the_smallest_normal_number(amax: float, dtype: torch.dtype) -> None:
    scale = convert_to_scale(torch.tensor([amax, 1.0], dtype=torch.float64), 127, dtype=dtype)
    assert float(scale[0]) == torch.finfo(dtype).tiny
    assert float(scale[1]) > torch.finfo(dtype).tiny


def test_a_range_that_underflows_float16_keeps_a_positive_scale() -> None:
    """1e-6 / 127 is 8e-9, which float16 rounds to zero; float32 has no trouble with it."""
    amax = torch.tensor(1e-6)
    assert float((amax / 127).half()) == 0
    assert (
        float(convert_to_scale(amax, 127, dtype=torch.float16)) == torch.finfo(torch.float16).tiny
    )
    assert float(convert_to_scale(amax, 127)) == pytest.approx(1e-6 / 127, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_broken_statistics_are_refused(bad: float) -> None:
    with pytest.raises(QuantizationError, match="NaN, Inf or a negative"):
        convert_to_scale(torch.tensor([1.0, bad]), 127)


def test_an_overflowing_scale_is_refused_with_its_amax() -> None:
    with pytest.raises(
        QuantizationError, match=r"overflows torch.float16: the largest amax is 1e\+08"
    ):
        convert_to_scale(torch.tensor([1.0, 1e8]), 7, dtype=torch.float16)


@pytest.mark.parametrize("maxbound", [0.0, -127.0, math.nan])
def test_a_maxbound_that_is_not_positive_is_refused(maxbound: float) -> None:
    with pytest.raises(QuantizationError, match="maxbound must be positive"):
        convert_to_scale(torch.ones(1), maxbound)


@given(st.floats(1e-3, 1e4))
def test_the_two_conventions_differ_by_127_5_over_127(amax: float) -> None:
    data = torch.tensor([-amax, amax / 2], dtype=torch.float64)
    qat = compute_scale(data, -128, 127)
    symmetric = convert_to_scale(data.abs().max(), 127, dtype=torch.float64)
    assert float(qat) == pytest.approx(amax / 127.5, rel=1e-12)
    assert float(symmetric / qat) == pytest.approx(127.5 / 127, rel=1e-12)
    # over the narrow range they are the same
    assert float(compute_scale(data, -127, 127)) == pytest.approx(float(symmetric), rel=1e-12)


def test_compute_scale_keeps_the_dtype_and_survives_zeros() -> None:
    scale = compute_scale(torch.zeros(3, dtype=torch.float16), -128, 127)
    assert scale.dtype == torch.float16
    assert scale.shape == ()
    assert float(scale) == torch.finfo(torch.float16).tiny


@pytest.mark.parametrize(
    ("data", "low", "high", "message"),
    [
        (torch.ones(2), 3, 3, "quant_max .3. must be above"),
        (torch.ones(2), 127, -128, "must be above"),
        (torch.ones(0), -128, 127, "empty"),
        (torch.tensor([math.nan]), -128, 127, "NaN"),
    ],
)
def test_compute_scale_refuses(data: Tensor, low: float, high: float, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        compute_scale(data, low, high)
