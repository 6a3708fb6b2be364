"""Fake-quantizers: what stands before a tensor of a prepared model, observes it and rounds it.

The arithmetic is that of the exported model: :mod:`calib.arithmetic.grids` and
:mod:`calib.arithmetic.inputs`, in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from calib.arithmetic.grids import Grid, expand_grid, grid_of
from calib.arithmetic.inputs import fake_quantize_input, input_grid
from calib.errors import QuantizationError
from calib.fake_quant.states import FakeQuantState
from calib.fake_quant.straight_through import replace_straight_through, round_straight_through
from calib.observers.forward import observe_named
from calib.observers.observer import Observer, ObserverFactory
from calib.observers.statistics import Limits
from calib.schemes import TensorScheme

Role = Literal["input", "weight"]
_OBSERVER = "observer."
"""What the names of an observer's own tensors begin with among a fake-quantizer's parameters."""


class FakeQuantizer(nn.Module, ABC):
    """What every kind of fake-quantizer has in common: states, observing, and saving what was
    observed.

    Inputs are observed over all batches. A weight is there as a whole each time, so what was
    observed of it before is forgotten; otherwise training could only ever widen its range.

    Args:
        name: of the tensor, for messages: ``layers.0.q_proj (input)``.
        role: whether the tensor is the input ``[..., in]`` of a linear or its weight ``[out, in]``.
        scheme: how it is quantized.
        factory: makes its observer.
    """

    def __init__(
        self, name: str, role: Role, scheme: TensorScheme, factory: ObserverFactory
    ) -> None:
        super().__init__()
        self.name = name
        self.role = role
        self.scheme = scheme
        self.state = FakeQuantState.CALIBRATION
        self._factory = factory
        self._observer: Observer = factory(scheme)

    @property
    @abstractmethod
    def has_limits(self) -> bool:
        """Whether it knows what to round to."""

    @abstractmethod
    def limits(self) -> Limits:
        """Least and greatest value of each group, float64, from which the grid follows."""

    @abstractmethod
    def set_limits(self, low: Tensor, high: Tensor) -> None:
        """Take limits from elsewhere."""

    @abstractmethod
    def rounded(self, x: Tensor) -> Tensor:
        """``x`` on the grid, with gradients."""

    @property
    def calibrated(self) -> bool:
        """Whether there is anything to calibrate: dynamic schemes take their limits while
        running.
        """
        return self.role == "weight" or self.scheme.needs_calibration

    def forward(self, x: Tensor) -> Tensor:
        """Observe and round ``x``, as far as the state says so.

        Raises:
            QuantizationError: ``x`` holds NaN or Inf while it is observed, or is to be rounded
                before any calibration.
        """
        if self.state.observes and self.calibrated and x.numel():
            self.observe(x)
        if not self.state.rounds or not x.numel():
            return x
        if self.calibrated and not self.has_limits:
            raise QuantizationError(
                f"'{self.name}' was never calibrated and cannot be rounded",
                hint="Run batches in the state CALIBRATION, or load observer parameters, first.",
            )
        return self.rounded(x)

    def observe(self, x: Tensor) -> None:
        """Show ``x`` to the observer and take its limits over.

        An observer that is new while limits are known, because they were loaded, starts from these.
        """
        if self.role == "weight":
            self._observer = self._factory(self.scheme)
        elif not self._observer.count and self.has_limits:
            self._observer.observe(torch.stack(self.limits()))
        observe_named(self._observer, self.name, x)
        self.set_limits(*self._observer.limits())

    def observer_params(self) -> dict[str, Tensor]:
        """``low`` and ``high``, and under ``observer.`` what the observer of an input gathered.

        Raises:
            QuantizationError: it was never calibrated.
        """
        if not self.has_limits:
            raise QuantizationError(
                f"'{self.name}' was never calibrated and has no parameters to save",
                hint="Run batches in the state CALIBRATION first.",
            )
        low, high = self.limits()
        params = {"low": low.detach().cpu().clone(), "high": high.detach().cpu().clone()}
        if self.role == "input" and self._observer.count:
            params |= {
                _OBSERVER + key: value.clone() for key, value in self._observer.state().items()
            }
        return params

    def load_observer_params(self, params: Mapping[str, Tensor]) -> None:
        """Take over limits, and what was gathered by an observer with statistics of the same kind.

        Raises:
            QuantizationError: the limits are not finite, or low lies above high.
        """
        low, high = params["low"], params["high"]
        if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
            raise QuantizationError(
                f"the limits loaded for '{self.name}' are no range",
                hint="The file of observer parameters is damaged.",
            )
        self.set_limits(low, high)
        self._observer = self._factory(self.scheme)
        gathered = {
            key.removeprefix(_OBSERVER): value
            for key, value in params.items()
            if key.startswith(_OBSERVER)
        }
        if set(gathered) == set(self._observer.state()):
            self._observer.load_state(gathered)

    def grid(self) -> Grid:
        """The calibrated part of the grid."""
        make = input_grid if self.role == "input" else grid_of
        return make(*self.limits(), self.scheme, torch.float32)

    def spread(self, grid: Grid, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of ``grid``, broadcastable against ``x``; differentiable."""
        if self.role == "input":
            return grid.scale, grid.zero_point
        return expand_grid(grid, x.shape, self.scheme.granularity)


class FakeQuantize(FakeQuantizer):
    """Rounds to the grid of the observed limits.

    Args:
        shape: of the limits; see :class:`FakeQuantizer` for the others.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        name: str,
        role: Role,
        scheme: TensorScheme,
        factory: ObserverFactory,
        shape: torch.Size,
    ) -> None:
        super().__init__(name, role, scheme, factory)
        self.register_buffer("low", torch.full(shape, torch.inf, dtype=torch.float64))
        self.register_buffer("high", torch.full(shape, -torch.inf, dtype=torch.float64))

    @property
    def has_limits(self) -> bool:
        """See :class:`FakeQuantizer`."""
        return bool((self.low <= self.high).all())

    def limits(self) -> Limits:
        """See :class:`FakeQuantizer`."""
        return self.low, self.high

    def set_limits(self, low: Tensor, high: Tensor) -> None:
        """See :class:`FakeQuantizer`."""
        self.low.copy_(low)
        self.high.copy_(high)

    def rounded(self, x: Tensor) -> Tensor:
        """See :class:`FakeQuantizer`. What a dynamic scheme rounds is within limits of its own: no
        gradient is cut.
        """
        if self.role == "weight" or not self.scheme.dynamic:
            scale, zero = self.spread(self.grid(), x)
            return round_straight_through(x, scale, zero, self.scheme.format)
        second = self.grid().scale if self.calibrated else None
        return replace_straight_through(
            x, fake_quantize_input(x.detach().float(), self.scheme, second)
        )
