"""Experts as modules: two linears each instead of slices of two 3-D parameters, in one loop for
every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from calib.rotations.rotation_set import Rotation

Expert = Callable[[int, Tensor], Tensor]
"""What expert ``e`` makes of its tokens ``[n, h]``: ``[n, h]``."""


def mix_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, expert: Expert
) -> Tensor:
    """The eager loop over experts (transformers ``MixtralExperts.forward``): each is run once, on
    its tokens only.

    Args:
        hidden_states: ``[tokens, h]``.
        top_k_index: chosen experts, ``[tokens, k]``.
        top_k_weights: their weights, ``[tokens, k]``.
        expert: computes one expert; it is not called for experts without tokens.

    Returns:
        ``[tokens, h]``, in the dtype of ``hidden_states``.
    """
    result = torch.zeros_like(hidden_states)
    for index in sorted(set(top_k_index.flatten().tolist())):
        token, position = torch.where(top_k_index == index)
        found = expert(index, hidden_states[token]) * top_k_weights[token, position, None]
        result.index_add_(0, token, found.to(result.dtype))
    return result


class Experts(nn.Module):
    """Stands in for a module with ``gate_up_proj [E, 2 f, h]`` and ``down_proj [E, h, f]``.

    Its linears have the dotted names that :mod:`calib.architectures.experts` gives them, so that
    whatever finds a linear by its name finds that of an expert.

    Args:
        gate_up: for each expert what maps ``[n, h]`` to ``[n, 2 f]``, gate before up.
        down: for each expert what maps ``[n, f]`` to ``[n, h]``.
        activation: between the two, applied to the gate.
        rotation: R4, applied before ``down``; ``None`` if there is none, or ``down`` applies it.
    """

    def __init__(
        self,
        gate_up: Iterable[nn.Module],
        down: Iterable[nn.Module],
        activation: Callable[[Tensor], Tensor],
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.ModuleList(gate_up)
        self.down_proj = nn.ModuleList(down)
        self.act_fn = activation
        self.rotation = rotation

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See :func:`mix_experts`."""

        def expert(index: int, x: Tensor) -> Tensor:
            gate, up = self.gate_up_proj[index](x).chunk(2, dim=-1)
            inner = self.act_fn(gate) * up
            found: Tensor = self.down_proj[index](
                inner if self.rotation is None else self.rotation.apply(inner)
            )
            return found

        return mix_experts(hidden_states, top_k_index, top_k_weights, expert)
