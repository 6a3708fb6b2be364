"""The streaming histogram: what it counts, and that order and splitting change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.errors import QuantizationError
from calib.observers.histogram import BINS, OCTAVES, PER_OCTAVE, Histogram

# the machine may be busy; time is not what these test
quick = settings(max_examples=40, deadline=None)
scales = st.sampled_from([1e-30, 1e-6, 1.0, 3e4, 1e30])
seeds = st.integers(0, 2**31)


def data(seed: int, scale: float, size: int = 500, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cauchy values: magnitudes over many octaves, of both signs, with some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(size, dtype=torch.float64).cauchy_(generator=generator)
    x[torch.rand(size, generator=generator) < 0.1] = 0
    return (x * scale).clamp(-1e37, 1e37).to(dtype)


def histogram_of(*batches: Tensor) -> Histogram:
    result = Histogram()
    for batch in batches:
        result.add(batch)
    return result


def assert_same(a: Histogram, b: Histogram) -> None:
    for (name, left), (other, right) in zip(a.state().items(), b.state().items(), strict=True):
        assert name == other
        assert torch.equal(left, right), name


@given(seeds, scales, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@quick
def test_counts_are_those_of_numpy(seed: int, scale: float, dtype: torch.dtype) -> None:
    x = data(seed, scale, dtype=dtype)
    histogram = histogram_of(x)
    lower, upper = histogram.edges()
    values = x.double().numpy()
    for sign, chosen in enumerate((-values[values < 0], values[values >= 0])):
        expected, _ = np.histogram(chosen, bins=np.append(lower, upper[-1]))
        assert np.array_equal(histogram.counts[sign].numpy(), expected)
    assert histogram.zeros == int((values == 0).sum())
    assert histogram.count == x.numel() == int(histogram.counts.sum())


def test_bins_are_narrow_and_adjoin() -> None:
    lower, upper = histogram_of(torch.tensor([3.0])).edges()
    assert np.array_equal(lower[1:], upper[:-1])
    assert upper[-1] == 4
    assert lower[1] == 4 / 2**OCTAVES
    assert ((upper - lower)[1:] <= lower[1:] / PER_OCTAVE).all()


@given(seeds, st.lists(scales, min_size=2, max_size=5), st.randoms(use_true_random=False))
@quick
def test_any_order_and_split_gives_the_same_bits(
    seed: int, batch_scales: list[float], random: object
) -> None:
    batches = [data(seed + index, scale) for index, scale in enumerate(batch_scales)]
    at_once = histogram_of(torch.cat(batches))
    shuffled = batches.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert_same(histogram_of(*shuffled), at_once)
    merged = Histogram()
    for batch in shuffled:
        merged.merge(histogram_of(batch))
    assert_same(merged, at_once)


@given(seeds, scales)
@settings(max_examples=20, deadline=None)
def test_linear_bins_are_those_of_numpy_without_zeros(seed: int, scale: float) -> None:
    x = data(seed, scale)
    histogram = histogram_of(x)
    counts, width = histogram.linear()
    magnitudes = x.double().abs().numpy()
    expected, _ = np.histogram(magnitudes[magnitudes > 0], bins=np.arange(len(counts) + 1) * width)
    assert np.array_equal(counts, expected)
    assert PER_OCTAVE < len(counts) <= 2 * PER_OCTAVE
    assert (len(counts) - 1) * width <= histogram.amax < len(counts) * width


def test_all_zero_and_nothing() -> None:
    zeros = histogram_of(torch.zeros(7))
    assert zeros.amax == 0
    assert zeros.zeros == zeros.count == 7
    values, counts = zeros.points()
    assert values.tolist() == [0.0]
    assert counts.tolist() == [7]
    zeros.add(torch.tensor([1e30]))
    assert_same(zeros, histogram_of(torch.cat([torch.zeros(7), torch.tensor([1e30])])))
    zeros.merge(Histogram())
    assert zeros.count == 8


def test_a_single_value_stands_for_itself() -> None:
    values, counts = histogram_of(torch.full((3,), -1.2345678)).points()
    assert values.tolist() == [torch.tensor(-1.2345678).double().item()]
    assert counts.tolist() == [3]


def test_size_is_bounded() -> None:
    histogram = histogram_of(*(data(seed, 10.0 ** (seed - 20)) for seed in range(40)))
    assert histogram.counts.shape == (2, BINS)
    assert sum(value.nbytes for value in histogram.state().values()) < 300_000


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(bad: float) -> None:
    histogram = histogram_of(torch.ones(3))
    before = {name: value.clone() for name, value in histogram.state().items()}
    with pytest.raises(QuantizationError, match="NaN or Inf"):
        histogram.add(torch.tensor([1.0, bad]))
    assert all(torch.equal(value, before[name]) for name, value in histogram.state().items())


def test_state_goes_to_another_histogram() -> None:
    x = data(1, 1.0)
    other = Histogram()
    other.load_state(histogram_of(x[:200]).state())
    other.add(x[200:])
    assert_same(other, histogram_of(x))
    with pytest.raises(QuantizationError, match="observer state holds low"):
        other.load_state({"low": torch.zeros(())})
