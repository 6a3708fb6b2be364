"""Least and greatest value: over everything, or averaged over batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from calib.observers.statistics import Reduce, finite_limits, take


class Extremes:
    """Least and greatest value of each group over all that was added; exact, and the same in any
    order.

    Args:
        reduce: the limits of one tensor, any shape, which is then that of ``low`` and ``high``.

    Attributes:
        low: float64, +inf before anything was added.
        high: float64, -inf before anything was added.
    """

    def __init__(self, reduce: Reduce = torch.aminmax) -> None:
        self._reduce = reduce
        self.count = 0
        self.low = torch.tensor(torch.inf, dtype=torch.float64)
        self.high = -self.low

    def add(self, x: Tensor) -> None:
        """Widen the range to the values of ``x``."""
        low, high = finite_limits(x, self._reduce)
        self._widen(low, high, x.numel())

    def merge(self, other: Extremes) -> None:
        """Widen the range to that of ``other``."""
        self._widen(other.low, other.high, other.count)

    def state(self) -> dict[str, Tensor]:
        """``low``, ``high`` and ``count``."""
        return {"low": self.low, "high": self.high, "count": torch.tensor(self.count)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved :meth:`state`."""
        self.low, self.high, count = take(state, "low", "high", "count")
        self.count = int(count)

    def _widen(self, low: Tensor, high: Tensor, count: int) -> None:
        self.low = torch.minimum(self.low, low)
        self.high = torch.maximum(self.high, high)
        self.count += count


class MovingExtremes:
    """Exponential average of the least and greatest value of each batch:

        low <- m low + (1 - m) min(x),   high <- m high + (1 - m) max(x),   the first batch as it is

    It depends on the order of the batches, as it is meant to: in training, later ones count more.
    Two averages merge into their mean weighted by batches, which has no order.

    Args:
        momentum: m, the weight of the past, in 0 … 1.
        reduce: as in :class:`Extremes`.
    """

    def __init__(self, momentum: float, reduce: Reduce = torch.aminmax) -> None:
        self._momentum = momentum
        self._reduce = reduce
        self.count = 0
        self._batches = 0
        self.low = torch.zeros((), dtype=torch.float64)
        self.high = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Move the averages towards the extremes of ``x``, which is one batch."""
        low, high = finite_limits(x, self._reduce)
        self._combine(low, high, self._momentum if self._batches else 0.0)
        self._batches += 1
        self.count += x.numel()

    def merge(self, other: MovingExtremes) -> None:
        """Average with ``other`` by batches."""
        batches = self._batches + other._batches
        if other._batches:
            self._combine(other.low, other.high, self._batches / batches)
        self._batches = batches
        self.count += other.count

    def state(self) -> dict[str, Tensor]:
        """``low``, ``high``, ``count`` and ``batches``."""
        counts = {"count": torch.tensor(self.count), "batches": torch.tensor(self._batches)}
        return {"low": self.low, "high": self.high, **counts}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved :meth:`state`."""
        self.low, self.high, count, batches = take(state, "low", "high", "count", "batches")
        self.count, self._batches = int(count), int(batches)

    def _combine(self, low: Tensor, high: Tensor, keep: float) -> None:
        self.low = keep * self.low + (1 - keep) * low
        self.high = keep * self.high + (1 - keep) * high
