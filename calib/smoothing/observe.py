"""What smoothing asks of the input of each group: how large every channel is, and how channels go
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.modules.watch import Run, require_finite, watching
from calib.smoothing.groups import SmoothingGroup
from calib.weights.moments import Moment, observe_moments


@dataclass(frozen=True)
class GroupInputs:
    """Statistics of the activation that the readers of a group share, over all tokens: where R4
    rotates it, of what it is before.

    Attributes:
        amax: largest magnitude of each channel, float64 ``[in]``.
        mean_abs: mean magnitude of each channel, float64 ``[in]``.
        moment: ``E[x^T x]``, float64 ``[in, in]``; ``None`` if it was not asked for.
    """

    amax: Tensor
    mean_abs: Tensor
    moment: Tensor | None = None


def observe_channels(
    model: nn.Module,
    groups: Sequence[SmoothingGroup],
    run: Run,
    *,
    moments: bool = False,
    prefix: str = "",
) -> dict[str, GroupInputs]:
    """Watch the input of every group while ``run(model)`` runs.

    Args:
        model: a fused model that is not smoothed yet (:func:`calib.fusing.materialize`), or
            whatever ``run`` runs.
        groups: what to watch.
        run: feeds batches without padding to the model, as
            :func:`calib.data.forward_loop.create_forward_loop` makes them.
        moments: whether second moments are wanted, which a search needs. Each takes 8 in^2 bytes:
            of a large model, observe one layer at a time.
        prefix: what module names start with that ``model`` itself stands for, such as
            ``model.layers.3.`` if it is a decoder block.

    Returns:
        The statistics on the CPU, by group.

    Raises:
        CheckpointError: a module of a group does not exist.
        QuantizationError: ``run`` never reached a group (all are named), or an input holds NaN or
            Inf.
    """
    names = [group.observed_at.removeprefix(prefix) for group in groups]
    channels = {name: _Channels() for name in names}

    def watched(model: nn.Module) -> None:
        with watching(model, inputs=channels, first=True):
            run(model)

    found: Mapping[str, Moment] = {}
    if moments:
        found = observe_moments(model, names, watched, first=True)
    else:
        watched(model)
    require_finite({name: statistics.amax for name, statistics in channels.items()})
    return {
        group.name: channels[name].result(found[name].result() if moments else None)
        for name, group in zip(names, groups, strict=True)
    }


class _Channels:
    """What has been seen of the input ``[..., in]`` of one module."""

    def __init__(self) -> None:
        self.tokens = 0
        self.amax = torch.zeros((), dtype=torch.float64)
        self._sum = torch.zeros((), dtype=torch.float64)

    def __call__(self, x: Tensor) -> None:
        magnitude = x.detach().reshape(-1, x.shape[-1]).abs()
        if not magnitude.shape[0]:
            return
        # The sum of a batch would overflow float16, and stop growing in bfloat16.
        wide = torch.promote_types(x.dtype, torch.float32)
        self.amax = torch.maximum(self.amax, magnitude.amax(dim=0).cpu().double())
        self._sum = self._sum + magnitude.sum(dim=0, dtype=wide).cpu().double()
        self.tokens += magnitude.shape[0]

    def result(self, moment: Tensor | None) -> GroupInputs:
        """The statistics so far, with the second moment that was taken beside them."""
        return GroupInputs(self.amax, self._sum / self.tokens, moment)
