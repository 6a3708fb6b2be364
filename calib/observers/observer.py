"""An observer: statistics of what it is shown, and the rule that makes limits of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from calib.errors import QuantizationError
from calib.observers.statistics import Limits, Statistics
from calib.schemes import TensorScheme

S = TypeVar("S", bound=Statistics)


class Observer(Protocol):
    """What watches one tensor of a model during calibration."""

    @property
    def count(self) -> int:
        """Values observed so far."""

    def observe(self, x: Tensor) -> None:
        """Take note of a float tensor of any shape; an empty one (an expert without tokens) says
        nothing.

        Raises:
            QuantizationError: ``x`` holds NaN or Inf.
        """

    def limits(self) -> Limits:
        """Least and greatest value of each group that shares a scale, float64.

        Raises:
            QuantizationError: nothing was observed.
        """

    def merge(self, other: Observer) -> None:
        """Add what another observer saw: one of another process, say.

        Raises:
            QuantizationError: the other one keeps other statistics.
        """

    def state(self) -> dict[str, Tensor]:
        """All that was gathered, ready for safetensors."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the :meth:`state` of an observer with the same statistics.

        Raises:
            QuantizationError: the state is one of other statistics.
        """


ObserverFactory = Callable[[TensorScheme], Observer]
"""Makes an observer for a tensor that is quantized by the scheme."""


class RuleObserver(Generic[S]):
    """The observer made of ``statistics`` and ``rule``.

    Args:
        spec: what the user asked for, such as ``percentile:99.9``; errors name it.
        statistics: empty ones.
        rule: limits of statistics that hold something.
    """

    def __init__(self, spec: str, statistics: S, rule: Callable[[S], Limits]) -> None:
        self.spec = spec
        self.statistics = statistics
        self._rule = rule

    @property
    def count(self) -> int:
        """Values observed so far."""
        return self.statistics.count

    def observe(self, x: Tensor) -> None:
        """See :meth:`Observer.observe`."""
        if x.numel():
            self.statistics.add(x)

    def limits(self) -> Limits:
        """See :meth:`Observer.limits`."""
        if not self.count:
            raise QuantizationError(
                f"observer '{self.spec}' has seen no values",
                hint="Run calibration batches before asking for limits.",
            )
        return self._rule(self.statistics)

    def merge(self, other: Observer) -> None:
        """See :meth:`Observer.merge`."""
        if not isinstance(other, RuleObserver) or type(other.statistics) is not type(
            self.statistics
        ):
            raise QuantizationError(
                f"observer '{self.spec}' cannot take over what another kind of observer gathered",
                hint="Use the same observer in every process.",
            )
        self.statistics.merge(other.statistics)

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Observer.state`."""
        return self.statistics.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Observer.load_state`."""
        self.statistics.load_state(state)
