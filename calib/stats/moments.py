"""Mean, deviation, skewness and kurtosis of each channel, in one pass and bounded memory.

For two sets a and b with counts nₐ, n_b, n = nₐ + n_b, and δ = m_b − mₐ, the sums Mp = Σ (x − m)^p
merge as

    M3 = M3ₐ + M3_b + δ³ nₐ n_b (nₐ − n_b) / n² + 3 δ (nₐ M2_b − n_b M2ₐ) / n
    M4 = M4ₐ + M4_b + δ⁴ nₐ n_b (nₐ² − nₐ n_b + n_b²) / n³ + 6 δ² (nₐ² M2_b + n_b² M2ₐ) / n²
         + 4 δ (nₐ M3_b − n_b M3ₐ) / n

(P. Pébay, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
statistical moments", Sandia report SAND2008-6212, 2008), while the mean and M2 merge as in
:mod:`calib.capture.statistics`. Fourth powers span twice the exponents of squares, so everything
here is in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.capture.statistics import ChannelAccumulator, ChannelStatistics
from calib.capture.workspace import Chunk, Workspace, accumulator_device

CHUNK_ELEMENTS = 2**20
"""Elements that are brought to float64 at once: 8 MiB, a few times."""


@dataclass(frozen=True)
class MomentStatistics(ChannelStatistics):
    """Statistics of each channel, with its shape.

    Attributes:
        skewness: [..., n] float64, (M3 / count) / std³; 0 for a constant channel.
        kurtosis: [..., n] float64, (M4 / count) / std⁴: 3 for a normal distribution, at least 1 for
            any. 0 for a constant channel, which has none.
    """

    skewness: Tensor
    kurtosis: Tensor

    @property
    def values(self) -> int:
        """How many numbers these are the statistics of."""
        return self.count * self.mean.numel()

    def group(self, index: int) -> MomentStatistics:
        """The statistics of one group: entry ``index`` of the first dimension."""
        channels = super().group(index)
        return MomentStatistics(
            self.count,
            channels.mean,
            channels.std,
            channels.minimum,
            channels.maximum,
            self.skewness[index],
            self.kurtosis[index],
        )

    def pooled(self) -> MomentStatistics:
        """The statistics of all values of all channels together, each [].

        Channels are sets of equal count, so that with δ = m_c − m the sums about the common mean m
        are Σ_c M2_c + n δ², Σ_c M3_c + 3 δ M2_c + n δ³ and Σ_c M4_c + 4 δ M3_c + 6 δ² M2_c + n δ⁴.
        """
        mean = self.mean.mean()
        delta, variance = self.mean - mean, self.std.square()
        cubes, fourths = self.skewness * self.std**3, self.kurtosis * variance.square()
        second = (variance + delta.square()).mean()
        third = (cubes + 3 * delta * variance + delta**3).mean()
        fourth = (fourths + 4 * delta * cubes + 6 * delta.square() * variance + delta**4).mean()
        minimum, maximum = self.minimum.min(), self.maximum.max()
        skewness, kurtosis = _shape(second, third, fourth, minimum == maximum)
        return MomentStatistics(
            self.values, mean, second.sqrt(), minimum, maximum, skewness, kurtosis
        )


class MomentAccumulator(ChannelAccumulator):
    """Running :class:`MomentStatistics` of chunks, which should be in float64: see
    :func:`float64_chunks`.
    """

    def __init__(self, groups: int, channels: int, device: torch.device) -> None:
        super().__init__(groups, channels, device)
        self._cubes = torch.zeros_like(self._squares)
        self._fourths = torch.zeros_like(self._squares)

    def update(self, chunk: Chunk) -> None:
        """Add the tokens of ``chunk``."""
        squares = chunk.centred.square()
        cubes = (squares * chunk.centred).sum(dim=1)
        fourths = squares.square_().sum(dim=1)
        self._combine_higher(chunk.count, chunk.mean, chunk.squares, cubes, fourths)
        super().update(chunk)

    def merge(self, other: ChannelAccumulator) -> None:
        """Add all that ``other``, another moment accumulator, has seen.

        Raises:
            TypeError: ``other`` has not kept its higher moments.
        """
        if not isinstance(other, MomentAccumulator):
            raise TypeError("only a MomentAccumulator has the moments that one merges")
        if other.count:
            self._combine_higher(
                other.count, other._mean, other._squares, other._cubes, other._fourths
            )
        super().merge(other)

    def result(self) -> MomentStatistics:
        """The statistics so far, [G, n] on the CPU."""
        found = super().result()
        second, third, fourth = (
            sums.cpu() / self.count for sums in (self._squares, self._cubes, self._fourths)
        )
        skewness, kurtosis = _shape(second, third, fourth, found.minimum == found.maximum)
        return MomentStatistics(
            found.count, found.mean, found.std, found.minimum, found.maximum, skewness, kurtosis
        )

    def _combine_higher(
        self, count: int, mean: Tensor, squares: Tensor, cubes: Tensor, fourths: Tensor
    ) -> None:
        """Account for ``count`` tokens in M3 and M4; to be called before the mean and M2 change."""
        own, total = self.count, self.count + count
        delta = mean - self._mean
        self._fourths += (
            fourths
            + delta**4 * (own * count * (own**2 - own * count + count**2) / total**3)
            + 6 * delta.square() * (own**2 * squares + count**2 * self._squares) / total**2
            + 4 * delta * (own * cubes - count * self._cubes) / total
        )
        self._cubes += (
            cubes
            + delta**3 * (own * count * (own - count) / total**2)
            + 3 * delta * (own * squares - count * self._squares) / total
        )


def float64_chunks(x: Tensor, workspace: Workspace) -> Iterator[Chunk]:
    """``x`` [T, n] of any floating dtype as chunks [1, t, n] in float64; none where T is 0."""
    for part in torch.split(x, max(1, CHUNK_ELEMENTS // max(1, x.shape[1]))):
        if len(part):
            yield workspace.chunk(part.to(accumulator_device(x)).double().unsqueeze(0))


def _shape(
    second: Tensor, third: Tensor, fourth: Tensor, constant: Tensor
) -> tuple[Tensor, Tensor]:
    """Skewness and kurtosis of central moments; 0 where the values are ``constant`` or their
    squares underflow.
    """
    flat = constant | (second.square() == 0)
    spread = torch.where(flat, 1.0, second)
    return torch.where(flat, 0.0, third / spread**1.5), torch.where(
        flat, 0.0, fourth / spread.square()
    )
