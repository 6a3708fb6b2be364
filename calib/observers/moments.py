"""Mean and standard deviation over everything that was added, with the extremes beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from calib.observers.extremes import Extremes
from calib.observers.statistics import channel_limits, take, widened


class Moments:
    """Running mean and sum of squared deviations, float64: of all values, or of each channel.

    For two sets with counts nₐ, n_b, means mₐ, m_b, sums of squares Sₐ, S_b and δ = m_b − mₐ (Chan,
    Golub and LeVeque, 1979):

        m = mₐ + δ n_b / n,   S = Sₐ + S_b + δ² nₐ n_b / n,   n = nₐ + n_b

    Args:
        by_channel: keep them for each index of the last dimension; shape ``[channels]`` instead of
            ``[]``.

    Attributes:
        extremes: exact, of the same shape.
        mean: float64.
    """

    def __init__(self, *, by_channel: bool = False) -> None:
        self._by_channel = by_channel
        self.extremes = Extremes(channel_limits if by_channel else torch.aminmax)
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the population (divided by the count), float64."""
        return (self._squares / (self.count // max(self.mean.numel(), 1))).sqrt()

    def add(self, x: Tensor) -> None:
        """Add the values of ``x``, ``[..., channels]`` by channel."""
        self.extremes.add(x)
        wide = widened(x)
        wide = wide.reshape(-1, wide.shape[-1]) if self._by_channel else wide.flatten()
        mean = wide.mean(dim=0)
        squares = (wide - mean).square().sum(dim=0)
        self._combine(mean.cpu(), squares.cpu(), x.numel())

    def merge(self, other: Moments) -> None:
        """Add all that ``other`` was given; the same in any order but for float64 rounding."""
        if other.count:
            self._combine(other.mean, other._squares, other.count)
            self.extremes.merge(other.extremes)

    def state(self) -> dict[str, Tensor]:
        """``mean``, ``squares`` and the state of the extremes."""
        return {"mean": self.mean, "squares": self._squares, **self.extremes.state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved :meth:`state`."""
        self.mean, self._squares, *extremes = take(state, "mean", "squares", "low", "high", "count")
        self.extremes.load_state(dict(zip(("low", "high", "count"), extremes, strict=True)))
        self.count = self.extremes.count

    def _combine(self, mean: Tensor, squares: Tensor, count: int) -> None:
        delta, total = mean - self.mean, self.count + count
        self._squares = (
            self._squares + squares + delta.square() * (self.count / total * (count / mean.numel()))
        )
        self.mean = self.mean + delta * (count / total)
        self.count = total
