"""The accumulators against numpy, for every way to cut and merge the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.capture.statistics import ChannelAccumulator, CovarianceAccumulator
from calib.capture.workspace import Workspace

CPU = torch.device("cpu")
GROUPS, CHANNELS = 2, 5


def tokens(count: int, seed: int, offset: float = 0.0) -> Tensor:
    """[GROUPS, count, CHANNELS] float64, with channels of very different scale and correlated with
    each other.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64)
    x = torch.randn(GROUPS, count, CHANNELS, generator=generator, dtype=torch.float64) @ mixing
    return x * torch.tensor([1.0, 100.0, 0.01, 1.0, 3.0], dtype=torch.float64) + offset


def feed(
    x: Tensor,
    chunks: list[int] | int,
    channels: ChannelAccumulator,
    covariance: CovarianceAccumulator,
) -> None:
    """Give both accumulators the tokens in chunks, through one workspace."""
    workspace = Workspace()
    for part in torch.split(x, chunks, dim=1):
        chunk = workspace.chunk(part)
        channels.update(chunk)
        covariance.update(chunk, workspace)


def expect(
    x: Tensor, channels: ChannelAccumulator, covariance: CovarianceAccumulator, rtol: float
) -> None:
    """Compare with numpy. ``rtol`` is relative to the largest |x| of each channel, squared where x
    is.
    """
    a = x.double().numpy()
    scale = np.abs(a).max(axis=1)
    result = channels.result()
    covariances = covariance.finish()
    assert result.count == covariance.count == x.shape[1]
    for group in range(GROUPS):
        for got, want in (
            (result.mean, a[group].mean(axis=0)),
            (covariance.mean(), a[group].mean(axis=0)),
            (result.std, a[group].std(axis=0)),
        ):
            assert np.all(np.abs(got[group].numpy() - want) <= rtol * scale[group])
        np.testing.assert_array_equal(result.minimum[group], a[group].min(axis=0))
        np.testing.assert_array_equal(result.maximum[group], a[group].max(axis=0))
        want = np.cov(a[group], rowvar=False, ddof=0).reshape(CHANNELS, CHANNELS)
        bound = rtol * np.outer(scale[group], scale[group])
        assert np.all(np.abs(covariances[group].numpy() - want) <= bound)
    assert torch.equal(result.absmax, x.double().abs().amax(1))


# Every sum has at most 60 terms and is followed by at most 60 updates, each good to 2**-53 of the
# scale: 120 * 1.1e-16.
FLOAT64 = 1.4e-14


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 1000))
def test_any_chunking_equals_numpy_on_the_whole(chunks: list[int], seed: int) -> None:
    x = tokens(sum(chunks), seed, offset=5.0)
    channels, covariance = (
        make(GROUPS, CHANNELS, CPU) for make in (ChannelAccumulator, CovarianceAccumulator)
    )
    feed(x, chunks, channels, covariance)
    expect(x, channels, covariance, FLOAT64)


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 1000))
def test_merging_equals_the_concatenation(parts: list[int], seed: int) -> None:
    x = tokens(sum(parts), seed, offset=-3.0)
    channels, covariance = (
        ChannelAccumulator(GROUPS, CHANNELS, CPU),
        CovarianceAccumulator(GROUPS, CHANNELS, CPU),
    )
    for part in torch.split(x, parts, dim=1):
        part_channels = ChannelAccumulator(GROUPS, CHANNELS, CPU)
        part_covariance = CovarianceAccumulator(GROUPS, CHANNELS, CPU)
        feed(part, part.shape[1], part_channels, part_covariance)
        channels.merge(part_channels)
        covariance.merge(part_covariance)
    expect(x, channels, covariance, FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_activations_are_summed_without_further_loss(dtype: torch.dtype) -> None:
    x = tokens(1000, seed=3).to(dtype)
    channels, covariance = (
        ChannelAccumulator(GROUPS, CHANNELS, CPU),
        CovarianceAccumulator(GROUPS, CHANNELS, CPU),
    )
    feed(x, 128, channels, covariance)
    # the float32 product of 128 tokens: each entry is off by at most 128 * 2**-24 of the sum of
    # absolute terms
    expect(x, channels, covariance, 128 * 2.0**-24)


def test_a_large_mean_does_not_cancel() -> None:
    """E[x²] − E[x]² in float32 would be off by 1e8 * 2**-24 = 6 here, six times the variance
    itself.
    """
    x = (
        torch.randn(GROUPS, 512, CHANNELS, generator=torch.Generator().manual_seed(0)) + 1e4
    ).float()
    covariance = CovarianceAccumulator(GROUPS, CHANNELS, CPU)
    feed(x, 64, ChannelAccumulator(GROUPS, CHANNELS, CPU), covariance)
    want = np.stack([np.cov(group, rowvar=False, ddof=0) for group in x.double().numpy()])
    # The product of 64 tokens in float32, 64 * 2**-24 = 4e-6, and the square of a float32 mean's
    # rounding, (5e-4)**2.
    assert np.abs(covariance.finish().numpy() - want).max() < 1e-5
