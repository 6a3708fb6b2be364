"""A bounded, seeded sample of tokens that keeps the massive ones, with weights that make its sums
unbiased.

**Algorithm.** Every token has a *key*: 64 pseudo-random bits that depend on the seed, the site, the
row and the position alone. Out of all N tokens the reservoir keeps, with M + K its capacity,

* the M tokens of largest absolute value (*massive*; ties are broken by other random bits), each
  with weight 1, since they are kept with probability one;
* of the N − M others, the K with the smallest keys: a uniform sample without replacement, each kept
  with probability K / (N − M) and so with weight (N − M) / K.

For every function f, Σ weight · f(token) over the reservoir then has the expectation Σ f(token)
over all tokens (Horvitz and Thompson, 1952): which tokens are massive does not depend on the keys,
and given them the rest is a simple random sample.

**In one pass.** A token that leaves the massive part, because M larger ones have come, is offered
to the uniform part with its key, as if it arrived then. A token that was dropped cannot return: M
larger ones, or K smaller keys, were there before it and can only become more. So the reservoir is
the one that a sort of all tokens would give, whatever their order and however they were batched.

The random bits that break ties are independent of the keys. Breaking ties by the keys themselves
would take the small keys out of the uniform part, which is a bias where many tokens are equal: the
first token of every row at layer 0 is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Keys = NDArray[np.uint64]
Indices = NDArray[np.intp]

# Constants of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


_COLUMNS = 256
"""Columns of the sample that are put in order at once; bounds the copy."""


def _mix(bits: Keys) -> Keys:
    """SplitMix64's finaliser: a bijection of 64-bit words whose output bits each depend on all
    input bits.
    """
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))


def token_keys(seed: int, site: str, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Keys:
    """The key of each token [T], from the seed, the site's name, the row it stands in and its
    position there.
    """
    name = hashlib.sha256(f"{seed}:{site}".encode()).digest()
    start = np.frombuffer(name[:8], dtype="<u8").astype(np.uint64)
    # Two rounds, row and then position: one linear mix would relate the keys of (row 0, 1) and (row
    # 1, 0).
    row_bits = _mix(start + (rows.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return _mix(row_bits + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


@dataclass(frozen=True)
class ReservoirResult:
    """What a reservoir has kept.

    Attributes:
        rows: [S, n]: first the massive tokens, then the others, each in the order of their keys,
            which is random.
        weights: [S] float32: the inverse inclusion probability of each; their sum is the number of
            tokens seen.
        massive: how many of the rows are massive tokens.
    """

    rows: Tensor
    weights: Tensor
    massive: int


class TokenReservoir:
    """The reservoir described above.

    Args:
        store: [M + K, n] on the CPU, in the dtype of the activations: where the tokens are kept.
        massive: M, at most M + K − 1.
    """

    def __init__(self, store: Tensor, massive: int) -> None:
        capacity = len(store)
        self._capacity = capacity
        self._massive_capacity = massive
        self._rows = store
        self._keys: Keys = np.empty(capacity, dtype=np.uint64)
        self._absmax = np.empty(capacity, dtype=np.float64)
        self._is_massive = np.zeros(capacity, dtype=np.bool_)
        self._filled = 0
        self.seen = 0

    def offer(self, rows: Tensor, absmax: NDArray[np.float64], keys: Keys) -> None:
        """Offer tokens ``rows`` [T, n], on any device, with the largest absolute value [T] and the
        key [T] of each.
        """
        self.seen += len(keys)
        candidates = self._candidates(absmax, keys)
        if len(candidates) == 0:
            return

        all_keys = np.concatenate([self._keys[: self._filled], keys[candidates]])
        all_absmax = np.concatenate([self._absmax[: self._filled], absmax[candidates]])
        massive, others = self._select(all_keys, all_absmax)
        kept = np.concatenate([massive, others])
        arrived = kept[kept >= self._filled]
        occupied = np.zeros(self._capacity, dtype=np.bool_)
        occupied[kept[kept < self._filled]] = True
        slots = np.flatnonzero(~occupied)[: len(arrived)]
        chosen = torch.from_numpy(candidates[arrived - self._filled])
        self._rows[torch.from_numpy(slots)] = rows[chosen.to(rows.device)].to(self._rows)
        self._keys[slots] = all_keys[arrived]
        self._absmax[slots] = all_absmax[arrived]
        place = np.arange(len(all_keys))
        place[arrived] = slots
        self._is_massive[:] = False
        self._is_massive[place[massive]] = True
        self._filled = len(kept)

    def _candidates(self, absmax: NDArray[np.float64], keys: Keys) -> Indices:
        """Tokens that can enter at all: once the reservoir is full, a few of the thousands in a
        batch.
        """
        if self._filled < self._capacity:
            return np.arange(len(keys))
        enters = keys < self._keys[~self._is_massive].max()
        if self._massive_capacity:
            enters |= absmax >= self._absmax[self._is_massive].min()
        return np.flatnonzero(enters)

    def _select(self, keys: Keys, absmax: NDArray[np.float64]) -> tuple[Indices, Indices]:
        """Choose among the tokens held, which come first, and the arriving ones. Returns (massive,
        others).
        """
        held_massive = np.flatnonzero(self._is_massive[: self._filled])
        held_others = np.flatnonzero(~self._is_massive[: self._filled])
        arriving = np.arange(self._filled, len(keys))
        # A held token that is not massive has M larger ones before it already.
        pool = np.concatenate([held_massive, arriving])
        order = pool[np.lexsort((_mix(keys[pool] ^ _GOLDEN), -absmax[pool]))]
        massive, rest = order[: self._massive_capacity], order[self._massive_capacity :]
        others = np.concatenate([held_others, rest])
        room = self._capacity - self._massive_capacity
        if len(others) > room:
            others = others[np.argpartition(keys[others], room - 1)[:room]]
        return massive, others

    def result(self) -> ReservoirResult:
        """The sample, in an order that depends on the keys alone; the reservoir is spent by it.

        Its rows are the first of the store, where they are put in order: a copy in order would
        double the memory.
        """
        massive = np.flatnonzero(self._is_massive[: self._filled])
        others = np.flatnonzero(~self._is_massive[: self._filled])
        order = np.concatenate(
            [massive[np.argsort(self._keys[massive])], others[np.argsort(self._keys[others])]]
        )
        weights = torch.ones(self._filled)
        if len(others):
            weights[len(massive) :] = (self.seen - len(massive)) / len(others)
        rows, ordered = self._rows[: self._filled], torch.from_numpy(order)
        for columns in torch.split(rows, _COLUMNS, dim=1):
            columns.copy_(columns[ordered])
        return ReservoirResult(rows, weights, len(massive))
