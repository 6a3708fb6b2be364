"""Mergeable statistics: everything a rotation or an observer asks of an activation, in one pass and
bounded memory.

Both accumulators follow Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for
computing sample variances", 1979). For two sets a and b with counts nₐ, n_b, means mₐ, m_b and δ =
m_b − mₐ:

    m  = mₐ + δ · n_b / (nₐ + n_b)
    M2 = M2ₐ + M2_b + δ δᵀ · nₐ n_b / (nₐ + n_b)          M2 = Σ (x − m)(x − m)ᵀ

so a large mean is subtracted before anything is squared, and a sum of squares never cancels against
it. A chunk's own product is taken in float32 (float64 for float64 activations), sums over chunks
are kept in float64. The parts of a chunk, centred about its mean, come from
:mod:`calib.capture.workspace`.

Shapes: G groups (1 for R1, the key/value heads for R2), T tokens, n channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.capture.workspace import Chunk, Workspace

_BLOCK = 512
"""Rows of a covariance that are updated at once."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics of each channel over all tokens.

    Attributes:
        count: tokens seen.
        mean: [..., n] float64.
        std: [..., n] float64, of the population (divided by the count).
        minimum: [..., n] float64.
        maximum: [..., n] float64.
    """

    count: int
    mean: Tensor
    std: Tensor
    minimum: Tensor
    maximum: Tensor

    @property
    def absmax(self) -> Tensor:
        """[..., n] float64: the largest absolute value of each channel."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    def group(self, index: int) -> ChannelStatistics:
        """The statistics of one group: entry ``index`` of the first dimension."""
        vectors = (self.mean[index], self.std[index], self.minimum[index], self.maximum[index])
        return ChannelStatistics(self.count, *vectors)


class ChannelAccumulator:
    """Running :class:`ChannelStatistics` of chunks."""

    def __init__(self, groups: int, channels: int, device: torch.device) -> None:
        shape = (groups, channels)
        self.count = 0
        self._mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self._squares = torch.zeros(shape, dtype=torch.float64, device=device)
        self._minimum = torch.full(shape, torch.inf, dtype=torch.float64, device=device)
        self._maximum = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)

    def update(self, chunk: Chunk) -> None:
        """Add the tokens of ``chunk``."""
        self._combine(chunk.count, chunk.mean, chunk.squares, chunk.minimum, chunk.maximum)

    def merge(self, other: ChannelAccumulator) -> None:
        """Add all that ``other`` has seen, as if its tokens had been given to this accumulator."""
        if other.count:
            self._combine(other.count, other._mean, other._squares, other._minimum, other._maximum)

    def result(self) -> ChannelStatistics:
        """The statistics so far, [G, n] on the CPU."""
        std = (self._squares / self.count).sqrt()
        return ChannelStatistics(
            self.count, self._mean.cpu(), std.cpu(), self._minimum.cpu(), self._maximum.cpu()
        )

    def _combine(
        self, count: int, mean: Tensor, squares: Tensor, minimum: Tensor, maximum: Tensor
    ) -> None:
        delta = mean - self._mean
        total = self.count + count
        self._squares += squares.to(self._mean) + delta.square() * (self.count * count / total)
        self._mean += delta * (count / total)
        # In place: fresh small tensors between large ones that come and go would pin the heap,
        # batch after batch.
        torch.minimum(self._minimum, minimum.to(self._mean), out=self._minimum)
        torch.maximum(self._maximum, maximum.to(self._mean), out=self._maximum)
        self.count = total


class CovarianceAccumulator:
    """Running mean and covariance of chunks: G · n² float64 numbers, whatever T adds up to."""

    def __init__(self, groups: int, channels: int, device: torch.device) -> None:
        self.count = 0
        self.channels = channels
        self.device = device
        self._mean = torch.zeros((groups, channels), dtype=torch.float64, device=device)
        self._products = torch.zeros(
            (groups, channels, channels), dtype=torch.float64, device=device
        )

    def update(self, chunk: Chunk, workspace: Workspace) -> None:
        """Add the tokens of ``chunk``, with the buffers of ``workspace``, in which it lives.

        It should hold a few thousand at most: the error of the float32 product grows with T, while
        that of the float64 sum over chunks does not matter.
        """
        x = chunk.centred
        # In blocks of rows: the products of all would be as large as the covariance, and twice that
        # in float64.
        for first in range(0, self.channels, _BLOCK):
            rows = slice(first, min(first + _BLOCK, self.channels))
            shape = (x.shape[0], rows.stop - first, self.channels)
            block = torch.bmm(
                x[..., rows].mT, x, out=workspace.take("products", shape, x.dtype, x.device)
            )
            # Adding float32 to float64 would allocate this copy.
            addend = workspace.take("addend", shape, torch.float64, self.device).copy_(
                block.to(self.device)
            )
            self._products[:, rows].add_(addend)
        self._shift(chunk.count, chunk.mean)

    def merge(self, other: CovarianceAccumulator) -> None:
        """Add all that ``other`` has seen, as if its tokens had been given to this accumulator."""
        if other.count:
            self._products += other._products
            self._shift(other.count, other._mean)

    def mean(self) -> Tensor:
        """[G, n] float64 on the CPU."""
        return self._mean.cpu()

    def finish(self) -> Tensor:
        """[G, n, n] float64 on the CPU, of the population (divided by the count); the accumulator
        is spent by it.
        """
        return self._products.div_(self.count).cpu()

    def _shift(self, count: int, mean: Tensor) -> None:
        """Account for ``count`` tokens about ``mean`` [G, n], whose products have been added about
        that mean.
        """
        delta = mean - self._mean
        total = self.count + count
        self._products.baddbmm_(
            delta.unsqueeze(2), delta.unsqueeze(1), alpha=self.count * count / total
        )
        self._mean += delta * (count / total)
        self.count = total
