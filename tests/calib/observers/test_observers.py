"""Every observer against plain numpy, on random, heavy-tailed, constant, all-zero and
single-element data.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from calib.arithmetic.grids import grid_of, round_to_grid
from calib.observers import Observer, observer_named
from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    INT8,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerCluster,
    PerTensor,
    TensorScheme,
)
from calib.stats.clusters import NO_FUSED_KERNEL

Array = NDArray[np.float64]
BIN = 2**-10
"""Width of a histogram's bin, relative to what it holds."""
BELOW = 2**-15
"""Magnitudes below this, relative to the largest, may share one bin: 16 octaves, of which the
highest counts half.
"""
SUMS = 1e-12
"""Float64 means and deviations of a few thousand values, summed in another order."""

# the machine may be busy; time is not what these test
quick = settings(max_examples=40, deadline=None)
symmetric = TensorScheme(INT8, PerTensor())
asymmetric = TensorScheme(INT8, PerTensor(), symmetric=False)
schemes = st.sampled_from([symmetric, asymmetric])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Float32 data of one of the five kinds."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.integers(2, 3000))
    scale = draw(st.sampled_from([1e-4, 1.0, 500.0]))
    shift = draw(st.sampled_from([0.0, 3.0]))
    kind = draw(st.sampled_from(["random", "heavy", "constant", "zero", "single"]))
    if kind == "random":
        return (torch.randn(size, generator=generator) + shift) * scale
    if kind == "heavy":
        return torch.empty(size).cauchy_(generator=generator) * scale
    if kind == "zero":
        return torch.zeros(size)
    return torch.full(
        (1 if kind == "single" else size,), float(torch.randn((), generator=generator)) * scale
    )


def observed(spec: str, scheme: TensorScheme, *batches: Tensor) -> Observer:
    observer = observer_named(spec)(scheme)
    for batch in batches:
        observer.observe(batch)
    return observer


def limits(spec: str, scheme: TensorScheme, *batches: Tensor) -> tuple[float, float]:
    low, high = observed(spec, scheme, *batches).limits()
    assert low.dtype == high.dtype == torch.float64
    assert low.shape == high.shape == ()
    return float(low), float(high)


def split(x: Tensor) -> list[Tensor]:
    """In two batches, the first of which may be empty."""
    return [x[: len(x) // 3], x[len(x) // 3 :]]


@given(tensors(), schemes)
@quick
def test_min_max(x: Tensor, scheme: TensorScheme) -> None:
    assert limits("min_max", scheme, *split(x)) == (float(x.min()), float(x.max()))


@given(st.lists(tensors(), min_size=1, max_size=4), st.floats(0, 1))
@quick
def test_moving_average(batches: list[Tensor], momentum: float) -> None:
    low, high = (batches[0].double().numpy().min(), batches[0].double().numpy().max())
    for batch in batches[1:]:
        low = momentum * low + (1 - momentum) * batch.double().numpy().min()
        high = momentum * high + (1 - momentum) * batch.double().numpy().max()
    reach = max(float(batch.abs().max()) for batch in batches)
    found = limits(f"moving_average:{momentum!r}", symmetric, *batches)
    assert found == pytest.approx((low, high), rel=SUMS, abs=SUMS * reach)


@given(tensors(), st.floats(1e-3, 1e3))
@quick
def test_clip(x: Tensor, bound: float) -> None:
    extremes = np.array([x.min(), x.max()], dtype=np.float64)
    assert limits(f"clip:{bound!r}", symmetric, *split(x)) == tuple(
        np.clip(extremes, -bound, bound)
    )


@given(tensors(), st.floats(0.1, 20))
@quick
def test_clip_std(x: Tensor, k: float) -> None:
    values = x.double().numpy()
    ends = values.mean() + np.array([-k, k]) * values.std()
    expected = np.clip(ends, values.min(), values.max())
    tolerance = SUMS * (1 + k) * np.abs(values).max()
    # A deviation that is all rounding (constant data) is the root of a square: half the digits.
    assume(values.std() == 0 or values.std() > 1e-6 * np.abs(values).max())
    assert limits(f"clip_std:{k!r}", symmetric, *split(x)) == pytest.approx(
        expected, rel=0, abs=tolerance
    )


@given(st.floats(1e-20, 1e20), st.sampled_from([INT8, INT4]), st.booleans())
@quick
def test_fixed_scale_is_the_scale(
    scale: float, fmt: NumberFormat, without_zero_point: bool
) -> None:
    scheme = TensorScheme(fmt, PerTensor(), symmetric=without_zero_point)
    low, high = observed(f"fixed_scale:{scale!r}", scheme, torch.tensor([0.3, 9.0])).limits()
    grid = grid_of(low, high, scheme)
    assert grid.scale == torch.tensor(scale, dtype=torch.float64).float()
    assert grid.zero_point is None if without_zero_point else grid.zero_point == 0


@given(tensors(), st.sampled_from([50.1, 90.0, 99.9, 99.99, 100.0]))
@quick
def test_percentile_of_magnitudes(x: Tensor, p: float) -> None:
    values = np.sort(np.abs(x.double().numpy()))
    exact = values[math.ceil(Fraction(str(p)) * len(values) / 100) - 1]
    low, high = limits(f"percentile:{p}", symmetric, *split(x))
    found = max(-low, high)
    assert exact <= found <= max(exact * (1 + BIN), values[-1] * BELOW)
    if p == 100:
        assert (low, high) == (float(x.min()), float(x.max()))


@given(tensors(), st.sampled_from([90.0, 99.9, 100.0]))
@quick
def test_percentile_of_each_tail(x: Tensor, p: float) -> None:
    values = np.sort(x.double().numpy())
    rank = math.ceil(Fraction(str(p)) * len(values) / 100)
    below, above = values[-rank], values[rank - 1]
    low, high = limits(f"percentile:{p}", asymmetric, *split(x))
    share = BELOW * np.abs(values).max()
    assert below - max(abs(below) * BIN, share) <= low <= below
    assert above <= high <= above + max(abs(above) * BIN, share)


def relative_entropy(counts: Array, i: int, groups: int) -> float:
    """KL(P ‖ Q) written out group by group."""
    p = counts[:i].copy()
    p[-1] += counts[i:].sum()
    q = np.zeros(i)
    owner = np.arange(i) * groups // i
    for group in range(groups):
        inside = (owner == group) & (counts[:i] > 0)
        if inside.any():
            q[inside] = counts[:i][inside].sum() / inside.sum()
    if q.sum() == 0 or ((p > 0) & (q == 0)).any():
        return math.inf
    p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
    return float((p * np.log(p / q)).sum())


@given(tensors())
@settings(max_examples=15, deadline=None)
def test_entropy(x: Tensor) -> None:
    low, high = limits("entropy", TensorScheme(INT4, PerTensor()), *split(x))
    magnitudes = np.abs(x.double().numpy())
    if not magnitudes.any():
        assert (low, high) == (0, 0)
        return
    width = 2.0 ** math.frexp(magnitudes.max())[1] / 2048
    used = int(magnitudes.max() / width) + 1
    counts = np.histogram(magnitudes[magnitudes > 0], bins=np.arange(used + 1) * width)[0].astype(
        np.float64
    )
    threshold = max(-low, high)
    bins = used if threshold == magnitudes.max() else round(threshold / width)
    divergences = [relative_entropy(counts, i, groups=8) for i in range(8, used + 1, 8)]
    # The reference tries every eighth threshold; ours must be at least as good. Sums of 2000
    # float64 terms.
    assert relative_entropy(counts, bins, groups=8) <= min(divergences) + 1e-12


def rms_error(x: Tensor, low: float, high: float, scheme: TensorScheme) -> float:
    ends = (torch.tensor(end, dtype=torch.float64) for end in (low, high))
    grid = grid_of(*ends, scheme)
    wide = x.double()
    return float(
        (round_to_grid(wide, grid.scale, grid.zero_point, scheme.format) - wide)
        .square()
        .mean()
        .sqrt()
    )


def allowance(x: Tensor) -> float:
    """What binning may cost. The distance to the nearest point of a grid changes by no more than
    the value does, which is half a bin; so by Minkowski the root of the mean square does, once for
    each of two limits that are compared."""
    return 2 * (float(x.double().square().mean().sqrt()) * BIN / 2 + float(x.abs().max()) * BELOW)


@given(tensors(), st.sampled_from([INT8, INT4, FLOAT8, FLOAT4]))
@settings(max_examples=30, deadline=None)
def test_mse(x: Tensor, fmt: NumberFormat) -> None:
    scheme = TensorScheme(fmt, PerTensor())
    low, high = limits("mse", scheme, *split(x))
    amax = float(x.abs().max())
    tried = [amax * 2 ** (-i / 16) for i in range(160)]
    best = min(rms_error(x, -t, t, scheme) for t in tried)
    assert rms_error(x, low, high, scheme) <= best + allowance(x)


@given(tensors())
@settings(max_examples=10, deadline=None)
def test_mse_with_zero_point(x: Tensor) -> None:
    scheme = TensorScheme(INT4, PerTensor(), symmetric=False)
    low, high = limits("mse", scheme, *split(x))
    ends = min(0.0, float(x.min())), max(0.0, float(x.max()))
    tried = [
        (ends[0] * f, ends[1] * g) for f, g in ((1, 1), (0.9, 1), (1, 0.9), (0.5, 1), (1, 0.5))
    ]
    # Taking turns ends where neither limit alone can be improved: no such pair with one limit at
    # its extreme is better than the first turn, which starts there.
    best = min(rms_error(x, a, b, scheme) for a, b in tried if a == ends[0])
    assert rms_error(x, low, high, scheme) <= best + allowance(x)


def test_mse_gives_up_outliers_where_that_pays() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    low, high = limits("mse", TensorScheme(INT4, PerTensor()), x)
    # Round normal data to 15 levels: the optimum for uniform quantizers lies at 2.5 to 2.9
    # deviations (Max, 1960: 14 and 16 levels have steps of 0.365 and 0.335).
    assert 2.3 < high < 2.9
    assert low == -high


@pytest.mark.parametrize(
    "spec",
    ["min_max", "clip:2", "fixed_scale:0.1", "percentile:99", "entropy", "mse", "clip_std:2"],
)
@given(st.lists(tensors(), min_size=1, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None)
def test_merging_is_observing_everything(spec: str, batches: list[Tensor], random: object) -> None:
    together = observed(spec, symmetric, *batches)
    random.shuffle(batches)  # type: ignore[attr-defined]
    merged = observed(spec, symmetric)
    for batch in batches:
        merged.merge(observed(spec, symmetric, batch))
    assert merged.count == together.count == sum(batch.numel() for batch in batches)
    for a, b in zip(merged.limits(), together.limits(), strict=True):
        if spec.startswith("clip_std"):
            # Deviations of constant data are rounding; the root of a squared eps is what they may
            # come to.
            assert float(a) == pytest.approx(
                float(b), rel=1e-9, abs=1e-7 * max(float(x.abs().max()) for x in batches)
            )
        else:
            assert torch.equal(a, b)


def test_merged_moving_averages_weigh_by_batches() -> None:
    a = observed(
        "moving_average:0.5", symmetric, torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 3.0])
    )
    b = observed("moving_average:0.5", symmetric, torch.tensor([-8.0, 5.0]))
    a.merge(b)
    low, high = a.limits()
    assert float(low) == pytest.approx((2 * -2 - 8) / 3, rel=SUMS)
    assert float(high) == pytest.approx((2 * 2 + 5) / 3, rel=SUMS)


@pytest.mark.parametrize(
    "spec",
    [
        "min_max",
        "moving_average",
        "clip:2",
        "fixed_scale:0.1",
        "percentile",
        "entropy",
        "mse",
        "clip_std",
    ],
)
def test_state_continues_where_it_was_saved(spec: str) -> None:
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(4))
    whole = observed(spec, symmetric, *x)
    first = observed(spec, symmetric, x[0])
    second = observed(spec, symmetric)
    second.load_state(first.state())
    for batch in x[1:]:
        second.observe(batch)
    assert second.count == whole.count
    assert all(torch.equal(a, b) for a, b in zip(second.limits(), whole.limits(), strict=True))


def test_limits_by_channel_and_block() -> None:
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    for spec in ("min_max", "moving_average:0"):
        low, high = observed(spec, TensorScheme(INT8, PerChannel(0)), *x).limits()
        expected = x.amin(dim=(0, 2)) if spec == "min_max" else x[1].amin(dim=1)
        assert torch.equal(low, expected.double())
        assert high.shape == (6,)
    low, _ = observed("min_max", TensorScheme(INT8, PerBlock(2)), x[0]).limits()
    assert torch.equal(
        low, torch.stack([x[0, :, :2].amin(1), x[0, :, 2:4].amin(1), x[0, :, 4]], dim=1).double()
    )


def test_limits_by_cluster_cover_each_channel_and_no_more_than_two_ranges() -> None:
    assert NO_FUSED_KERNEL
    x = torch.randn(64, 3, 8, generator=torch.Generator().manual_seed(0))
    x[..., [2, 5]] *= 50
    low, high = observed("min_max", TensorScheme(INT8, PerCluster(2)), x[:32], x[32:]).limits()
    assert low.shape == high.shape == (8,)
    flat = x.reshape(-1, 8).double()
    large = torch.tensor([2, 5])
    small = torch.tensor([0, 1, 3, 4, 6, 7])
    for channels in (large, small):
        assert (high[channels] == flat[:, channels].max()).all()
        assert (low[channels] == flat[:, channels].min()).all()
