"""Fake-quantizers whose range is learned with the weights: LSQ and PACT.

Calibration gives the start, and training takes over: in the state QAT nothing is observed any more,
unless there is no start yet, which the first batch then gives. Both need an integer format with
scales that are static, stored as floats, and not those of clusters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from calib.arithmetic.grids import Grid, grid_of, round_to_grid
from calib.errors import QuantizationError
from calib.fake_quant.fake_quantize import FakeQuantizer, Role
from calib.fake_quant.states import FakeQuantState
from calib.fake_quant.straight_through import replace_straight_through, round_learned_step
from calib.observers.forward import observe_named
from calib.observers.observer import ObserverFactory
from calib.observers.statistics import Limits
from calib.schemes import PerCluster, TensorScheme

_TINY = torch.finfo(torch.float32).tiny


class LearnedRange(FakeQuantizer):
    """What LSQ and PACT share: one learned positive number for each group.

    Args:
        method: what the user called it, for messages.
        shape: of the learned numbers; see :class:`FakeQuantizer` for the others.
    """

    learned: Tensor

    def __init__(
        self,
        method: str,
        name: str,
        role: Role,
        scheme: TensorScheme,
        factory: ObserverFactory,
        shape: torch.Size,
    ) -> None:
        super().__init__(name, role, scheme, factory)
        # channels of a cluster would learn ranges of their own
        clustered = isinstance(scheme.granularity, PerCluster)
        if (
            scheme.format.kind != "integer"
            or scheme.dynamic
            or scheme.scale_format != "compute"
            or clustered
        ):
            raise QuantizationError(
                f"'{method}' cannot learn the range of {name}",
                hint=(
                    "it needs an integer format with static scales that are not those of clusters;"
                    " use fake_quant"
                ),
            )
        self.learned = nn.Parameter(torch.full(shape, torch.nan))

    @property
    def has_limits(self) -> bool:
        """See :class:`FakeQuantizer`."""
        return bool(torch.isfinite(self.learned).all())

    @property
    def positive(self) -> Tensor:
        """The learned numbers, of which an optimiser may make negative ones."""
        return self.learned.abs().clamp(min=_TINY)

    def observe(self, x: Tensor) -> None:
        """Only calibration, and the first batch of a training without one, may set what is
        learned.
        """
        if self.state is FakeQuantState.CALIBRATION:
            super().observe(x)
        elif not self.has_limits:
            self.start_from(x)

    def start_from(self, x: Tensor) -> None:
        """Set what is learned from the first batch."""
        super().observe(x)

    def _set(self, value: Tensor) -> None:
        with torch.no_grad():
            self.learned.copy_(value)


class LearnedStep(LearnedRange):
    """LSQ: the scale is learned (Esser et al., "Learned step size quantization", 2020). Symmetric.

    start without calibration:  s = 2 mean|x| / sqrt(qmax)
    gradient of s scaled by:    g = 1 / sqrt(N qmax)

    with N the weights that share the step, or of an input the features of one token: the loss is a
    mean over tokens, so that their number is in the gradient already.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        scheme: TensorScheme,
        factory: ObserverFactory,
        shape: torch.Size,
    ) -> None:
        if not scheme.symmetric:
            raise QuantizationError(
                f"'lsq' learns a step for {name} and no zero point",
                hint="use a symmetric scheme, or fake_quant",
            )
        super().__init__("lsq", name, role, scheme, factory, shape)

    def limits(self) -> Limits:
        """See :class:`FakeQuantizer`; those whose grid has the learned step."""
        high = self.positive.detach().double() * self.scheme.format.maxbound
        return -high, high

    def set_limits(self, low: Tensor, high: Tensor) -> None:
        """See :class:`FakeQuantizer`."""
        self._set(grid_of(low, high, self.scheme).scale)

    def start_from(self, x: Tensor) -> None:
        """As the paper starts; one mean for all groups of a weight."""
        observe_named(self._factory(self.scheme), self.name, x)  # for its check alone
        mean = x.detach().abs().float().mean()
        self._set((2 * mean / math.sqrt(self.scheme.format.qmax)).clamp(min=_TINY))

    def rounded(self, x: Tensor) -> Tensor:
        """See :class:`FakeQuantizer`."""
        step, _ = self.spread(Grid(self.positive), x)
        count = x.shape[-1] if self.role == "input" else x.numel() / self.learned.numel()
        return round_learned_step(
            x, step, self.scheme.format, 1 / math.sqrt(count * self.scheme.format.qmax)
        )


class LearnedClip(LearnedRange):
    """PACT: the clipping threshold is learned (Choi et al., "PACT: parameterized clipping
    activation", 2018).

        asymmetric (the paper's, for inputs that are never negative):   y = clamp(x, 0, a)
        symmetric:                                                      y = clamp(x, -a, a)

    then rounded to the grid of these limits. da gets the gradient of the values that were clipped.
    The paper adds a multiple of a² to the loss; that is left to the training loop.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        scheme: TensorScheme,
        factory: ObserverFactory,
        shape: torch.Size,
    ) -> None:
        super().__init__("pact", name, role, scheme, factory, shape)

    def limits(self) -> Limits:
        """See :class:`FakeQuantizer`; zero or minus the threshold, and the threshold."""
        high = self.positive.detach().double()
        return -high if self.scheme.symmetric else torch.zeros_like(high), high

    def set_limits(self, low: Tensor, high: Tensor) -> None:
        """See :class:`FakeQuantizer`."""
        if not self.scheme.symmetric and bool((low < 0).any()):
            raise QuantizationError(
                f"'pact' without symmetry clips at zero, and {self.name} has negative values",
                hint="use a symmetric scheme, or fake_quant",
            )
        self._set(torch.maximum(low.abs(), high.abs()).clamp(min=_TINY))

    def rounded(self, x: Tensor) -> Tensor:
        """See :class:`FakeQuantizer`."""
        bound, _ = self.spread(Grid(self.positive), x)
        lower = -bound if self.scheme.symmetric else torch.zeros_like(bound)
        wide = x.float()
        # By where, so that a value on the threshold gives its whole gradient to the threshold, as
        # in the paper.
        clipped = torch.where(wide >= bound, bound, torch.where(wide <= lower, lower, wide))
        scale, zero = self.spread(self.grid(), x)
        value = round_to_grid(clipped.detach(), scale, zero, self.scheme.format)
        return replace_straight_through(clipped, value).to(x.dtype)
