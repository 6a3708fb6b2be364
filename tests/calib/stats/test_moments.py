"""Moments against numpy in float64, for every way to cut and merge the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from calib.capture.statistics import ChannelAccumulator
from calib.capture.workspace import Workspace
from calib.stats.moments import MomentAccumulator, MomentStatistics, float64_chunks

CPU = torch.device("cpu")
CHANNELS = 6

# Sums of at most 60 terms, in at most 60 updates, each good to 2**-53 of the largest term; the
# fourth power of a deviation that is itself off by that much is off by four times it, and
# deviations are up to twice the values (2**4).
FLOAT64 = 60 * 4 * 2**4 * 2.0**-53


def tokens(count: int, seed: int) -> Tensor:
    """[count, CHANNELS] float64: normal, heavy-tailed, constant, all zero, far from zero, and two
    values only.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CHANNELS, generator=generator, dtype=torch.float64)
    x[:, 1] = x[:, 1] ** 7
    x[:, 2] = 0.1
    x[:, 3] = 0.0
    x[:, 4] += 1e3
    x[:, 5] = x[:, 5].sign()
    return x


def accumulated(x: Tensor, lengths: list[int] | None = None) -> MomentAccumulator:
    accumulator = MomentAccumulator(1, x.shape[1], CPU)
    workspace = Workspace()
    for part in torch.split(x, lengths or [len(x)]):
        for chunk in float64_chunks(part, workspace):
            accumulator.update(chunk)
    return accumulator


def central(a: NDArray[np.float64], power: int) -> NDArray[np.float64]:
    moment: NDArray[np.float64] = ((a - a.mean(axis=0)) ** power).mean(axis=0)
    return moment


def expect(x: Tensor, found: MomentStatistics, rtol: float = FLOAT64) -> None:
    """Compare with numpy; ``rtol`` is relative to a power of the largest magnitude of each
    channel.
    """
    a = x.double().numpy()
    scale = np.abs(a).max(axis=0)
    std = found.std.numpy()
    assert found.count == len(a)
    np.testing.assert_array_equal(found.minimum.numpy(), a.min(axis=0))
    np.testing.assert_array_equal(found.maximum.numpy(), a.max(axis=0))
    for got, want, power in (
        (found.mean.numpy(), a.mean(axis=0), 1),
        (std**2, central(a, 2), 2),
        (found.skewness.numpy() * std**3, central(a, 3), 3),
        (found.kurtosis.numpy() * std**4, central(a, 4), 4),
    ):
        assert np.all(np.abs(got - want) <= rtol * scale**power + np.finfo(np.float64).tiny)


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(sum)


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 1000))
def test_any_chunking_equals_numpy_on_the_whole(lengths: list[int], seed: int) -> None:
    x = tokens(sum(lengths), seed)
    expect(x, accumulated(x, lengths).result().group(0))


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 1000))
def test_merging_equals_the_concatenation(lengths: list[int], seed: int) -> None:
    x = tokens(sum(lengths), seed)
    whole = MomentAccumulator(1, CHANNELS, CPU)
    for part in torch.split(x, lengths):
        whole.merge(accumulated(part))
    expect(x, whole.result().group(0))


@settings(deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
)
def test_any_float32_values_have_finite_moments(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32).unsqueeze(1)
    found = accumulated(x).result().group(0)
    expect(x, found)
    assert bool(torch.isfinite(found.kurtosis).all() and torch.isfinite(found.skewness).all())


@pytest.mark.parametrize(
    ("values", "kurtosis", "skewness"),
    [
        ([-1.0, 1.0] * 50, 1.0, 0.0),  # the least there is
        # Bernoulli: 1/pq - 3 and (1 - 2p)/√(pq)
        ([1.0] * 10 + [0.0] * 90, 1 / 0.09 - 3, 0.8 / 0.3),
        (list(range(1, 102)), 3 * (3 * 101**2 - 7) / (5 * (101**2 - 1)), 0.0),  # discrete uniform
        ([0.1] * 7, 0.0, 0.0),  # a constant has none
        ([3.25], 0.0, 0.0),
    ],
)
def test_kurtosis_of_known_distributions(
    values: list[float], kurtosis: float, skewness: float
) -> None:
    found = accumulated(torch.tensor(values, dtype=torch.float64).unsqueeze(1)).result()
    # a hundred float64 roundings
    assert float(found.kurtosis) == pytest.approx(kurtosis, rel=1e-12)
    assert float(found.skewness) == pytest.approx(skewness, rel=1e-12, abs=1e-12)


def test_a_normal_sample_has_kurtosis_three() -> None:
    x = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # five deviations
    assert float(accumulated(x).result().kurtosis) == pytest.approx(
        3, abs=5 * (24 / 100_000) ** 0.5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_mean_does_not_cancel(dtype: torch.dtype) -> None:
    """Raw moments in float64 would lose E[x⁴] ~ 1e12 against a fourth central moment of 1e-4: all
    its digits.
    """
    x = (1000 + 8 * torch.randint(0, 2, (512, 1), generator=torch.Generator().manual_seed(0))).to(
        dtype
    )
    p = float((x == 1008).double().mean())
    found = accumulated(x, [64] * 8).result()
    assert float(found.kurtosis) == pytest.approx(1 / (p * (1 - p)) - 3, rel=1e-10)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 1000))
def test_pooled_statistics_are_those_of_all_values(count: int, seed: int) -> None:
    x = tokens(count, seed)
    pooled = accumulated(x).result().group(0).pooled()
    assert pooled.count == x.numel()
    single = MomentStatistics(
        pooled.count, *(value.reshape(1) for value in list(vars(pooled).values())[1:])
    )
    expect(x.reshape(-1, 1), single, FLOAT64 * CHANNELS)


def test_channel_statistics_without_higher_moments_cannot_be_merged() -> None:
    with pytest.raises(TypeError, match="MomentAccumulator"):
        MomentAccumulator(1, 2, CPU).merge(ChannelAccumulator(1, 2, CPU))
