"""What smoothing asks of the input of each group: how large every channel is, and how channels go
together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import QuantizationError
from calib.network.modules import get_submodule
from calib.smoothing.groups import SmoothingGroup
from calib.weights.moments import observe_moments


@dataclass(frozen=True)
class GroupInputs:
    """Statistics of the activation that the readers of a group share, over all tokens.

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
    run: Callable[[nn.Module], None],
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
    watched = {name: _Channels() for name in names}

    def watch(model: nn.Module) -> None:
        with ExitStack() as hooks, torch.no_grad():
            for name, channels in watched.items():
                module = get_submodule(model, name)
                hooks.callback(module.register_forward_pre_hook(channels, with_kwargs=True).remove)
            run(model)

    found = observe_moments(model, names, watch) if moments else {}
    if not moments:
        watch(model)
    _check(watched)
    return {
        group.name: watched[name].result(found[name].result() if moments else None)
        for name, group in zip(names, groups, strict=True)
    }


def _check(watched: Mapping[str, _Channels]) -> None:
    unreached = [name for name, channels in watched.items() if not channels.tokens]
    if unreached:
        raise QuantizationError(
            f"calibration never reached {len(unreached)} linear(s): {', '.join(unreached)}",
            hint=(
                "use more calibration rows (--nsamples), or check that the model runs these layers"
            ),
        )
    broken = [
        name for name, channels in watched.items() if not bool(torch.isfinite(channels.amax).all())
    ]
    if broken:
        raise QuantizationError(
            f"calibration found NaN or Inf in the input of {', '.join(broken)}",
            hint=(
                "check the checkpoint's weights; if the model overflows in its dtype, use --dtype"
                " bfloat16 or float32"
            ),
        )


class _Channels:
    """Forward pre-hook of one module, and what it has seen of its input ``[..., in]``."""

    def __init__(self) -> None:
        self.tokens = 0
        self.amax = torch.zeros((), dtype=torch.float64)
        self._sum = torch.zeros((), dtype=torch.float64)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
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
