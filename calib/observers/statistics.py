"""What observers gather from the tensors they see: bounded in size, and mergeable across processes.

Statistics live on the CPU and in float64 (counts in int64), whatever the dtype and device of what
is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, Self

import torch
from torch import Tensor

from calib.errors import NotFiniteError, QuantizationError

Limits = tuple[Tensor, Tensor]
"""Least and greatest value of each group that shares a scale, float64: shape ``[]``, or one of a
:class:`calib.schemes.Granularity`."""
Reduce = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Takes a tensor to the least and greatest value of each group."""


class Statistics(Protocol):
    """Something that adds up over tensors."""

    @property
    def count(self) -> int:
        """Values added so far."""

    def add(self, x: Tensor) -> None:
        """Add the values of a non-empty float tensor; QuantizationError if one is NaN or
        infinite.
        """

    def merge(self, other: Self) -> None:
        """Add all that ``other`` was given."""

    def state(self) -> dict[str, Tensor]:
        """Everything that was gathered, as tensors under names of their own."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace what was gathered by what :meth:`state` returned elsewhere."""


def finite_limits(x: Tensor, reduce: Reduce = torch.aminmax) -> Limits:
    """Limits of ``x``, float64 on the CPU. NaN and Inf show in them, so this is also the check for
    both.

    Raises:
        NotFiniteError: ``x`` holds NaN or Inf.
    """
    low, high = (limit.cpu().double() for limit in reduce(x.detach()))
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise NotFiniteError(
            "an observed tensor holds NaN or Inf",
            hint=(
                "The model overflows in its dtype (try bfloat16 or float32), or its weights are"
                " damaged."
            ),
        )
    return low, high


def channel_limits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Limits of each channel ``[channels]`` of an activation ``[..., channels]``."""
    low, high = torch.aminmax(x.reshape(-1, x.shape[-1]), dim=0)
    return low, high


def widened(x: Tensor) -> Tensor:
    """``x`` in float64 without gradient, on its own device unless that has no float64 (Apple's
    MPS).
    """
    return (x.detach().cpu() if x.device.type == "mps" else x.detach()).double()


def take(state: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """Copies of exactly the entries ``names``.

    Raises:
        QuantizationError: the state has other entries; it was saved by statistics of another kind.
    """
    if set(state) != set(names):
        raise QuantizationError(
            f"observer state holds {', '.join(sorted(state)) or 'nothing'}, expected"
            f" {', '.join(sorted(names))}",
            hint="It was saved by an observer of another kind.",
        )
    return [state[name].detach().cpu().clone() for name in names]
