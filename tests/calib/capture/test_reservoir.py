"""The reservoir: what it keeps, that nothing but the tokens decides it, and that its weights are
unbiased.
"""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calib.capture.reservoir import ReservoirResult, TokenReservoir, token_keys


def keys_of(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return token_keys(seed, "site", np.zeros(count, dtype=np.int64), np.arange(count))


def fill(
    absmax: NDArray[np.float64], keys: NDArray[np.uint64], order: list[list[int]], massive: int
) -> TokenReservoir:
    """A reservoir of 8 that is offered the tokens in the given batches. Token i is the row [i,
    2i].
    """
    reservoir = TokenReservoir(torch.empty(8, 2), massive)
    for batch in order:
        rows = torch.tensor([[float(i), 2.0 * i] for i in batch]).reshape(-1, 2)
        reservoir.offer(rows, absmax[batch], keys[batch])
    return reservoir


def same(a: ReservoirResult, b: ReservoirResult) -> bool:
    return (
        torch.equal(a.rows, b.rows) and torch.equal(a.weights, b.weights) and a.massive == b.massive
    )


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.integers(0, 4),
    st.randoms(use_true_random=False),
    st.integers(0, 100),
)
def test_equals_a_sort_of_all_tokens_however_they_arrive(
    sizes: list[int], massive: int, random: Random, seed: int
) -> None:
    count = len(sizes)
    absmax = np.array(sizes, dtype=np.float64)  # with many ties
    keys = keys_of(count, seed)
    order = list(range(count))
    random.shuffle(order)
    cuts = sorted(random.choices(range(count + 1), k=3))
    batches = [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, count], strict=True)]
    got = fill(absmax, keys, batches, massive).result()

    assert same(got, fill(absmax, keys, [[i] for i in range(count)], massive).result())
    kept = got.rows[:, 0].int().tolist()
    large, others = kept[: got.massive], kept[got.massive :]
    assert got.massive == min(massive, count)
    assert sorted(absmax[large], reverse=True) == sorted(absmax, reverse=True)[: got.massive]
    rest = sorted(set(range(count)) - set(large), key=lambda i: keys[i])
    assert others == rest[: 8 - massive]
    assert large == sorted(large, key=lambda i: keys[i])
    assert torch.equal(got.rows[:, 1], 2 * got.rows[:, 0])  # rows moved as a whole
    np.testing.assert_allclose(got.weights.sum(), count, rtol=1e-6)  # float32 weights
    assert torch.equal(got.weights[: got.massive], torch.ones(got.massive))


def test_everything_is_kept_while_there_is_room() -> None:
    got = fill(np.arange(7.0), keys_of(7), [[0, 1, 2], [3, 4, 5, 6]], 3).result()
    assert sorted(got.rows[:, 0].tolist()) == list(range(7))
    assert torch.equal(got.weights, torch.ones(7))


def test_weighted_sums_are_unbiased_with_outliers_and_ties() -> None:
    """The mean over many seeds of the estimated sum, against its exact standard error.

    Half of the tokens tie for the massive places, and the quantity summed differs among them. Were
    ties broken by the keys that also sample the rest, the massive tokens would take the smallest
    keys away from the tied ones, and the sample of the rest would favour the others.
    """
    count, massive, seeds = 60, 4, 3000
    values = np.random.default_rng(0).lognormal(size=count)
    absmax = np.where(np.arange(count) < count // 2, 9.0, 1.0)
    estimates = []
    variances = []
    for seed in range(seeds):
        keys = keys_of(count, seed)
        got = fill(absmax, keys, [list(range(count))], massive).result()
        kept = got.rows[:, 0].int().numpy()
        estimates.append(float(got.weights.numpy() @ values[kept]))
        # Given the massive tokens: simple random sampling of k out of n without replacement, Var =
        # n² (1 − k/n) S² / k
        rest = np.delete(values, kept[: got.massive])
        n, k = count - massive, 8 - massive
        variances.append(n**2 * (1 - k / n) * rest.var(ddof=1) / k)
    error = abs(np.mean(estimates) - values.sum())
    # five standard errors: a correct sampler fails once in 1.7 million choices of these seeds
    assert error < 5 * np.sqrt(np.mean(variances) / seeds)
    # and the spread is what theory says, to the 5-sigma error of a variance over this many draws
    # with heavy tails
    assert abs(np.var(estimates) / np.mean(variances) - 1) < 0.2


def test_ties_are_broken_independently_of_the_sampling() -> None:
    """All tokens tie, so every token must be kept equally often: 8 of 40. Keys as tie breakers
    would favour none.
    """
    count, seeds = 40, 2000
    kept = np.zeros(count)
    for seed in range(seeds):
        got = fill(np.ones(count), keys_of(count, seed), [list(range(count))], 4).result()
        kept[got.rows[:, 0].int().numpy()] += got.weights.numpy()
    # Each token's summed weight has mean `seeds`; a single weight is 0, 1 or (40 − 4) / 4 = 9 with
    # variance below 9.
    assert np.abs(kept - seeds).max() < 6 * np.sqrt(9 * seeds)


def test_keys_depend_on_seed_site_row_and_position() -> None:
    rows, positions = (part.ravel() for part in np.meshgrid(np.arange(50), np.arange(50)))
    keys = [token_keys(seed, site, rows, positions) for seed in (0, 1) for site in ("a", "b")]
    assert len(np.unique(np.concatenate(keys))) == 4 * 2500
    # uniform in [0, 1): the mean of 10 000 has standard error 0.289 / 100
    assert abs(np.concatenate(keys).astype(np.float64).mean() / 2.0**64 - 0.5) < 5 * 0.00289
