"""Rotary frequencies that depend on the length of a text, in a form that can be traced.

transformers decides between them in Python, by a number that a trace does not have:

    n = max(position_ids) + 1
    longrope:  inv_freq = long            if n > original, else short
    dynamic:   inv_freq = NTK scaling(n)  if n > longest,  else as initialised

In the graph both are values, and one is selected: ``where(n > limit, far, near)``. What cosines and
sines are multiplied by does not depend on n.

transformers remembers the longest text since the last short one, and this does not: after a text of
n > longest tokens, a model of type *dynamic* keeps its frequencies for texts down to that limit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LONG, DYNAMIC = "longrope", "dynamic"
"""Types of RoPE that :func:`trace_frequencies` knows, as transformers calls them."""


def trace_frequencies(network: nn.Module) -> None:
    """Let every rotary module of ``network`` whose frequencies depend on the length of the text
    select them in a way that can be traced, in place.

    Modules of a type that is not known are left alone: tracing them fails, and says where.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Module) and _varies(module):
            network.set_submodule(name, _Traceable(module))


def _types(rotary: nn.Module) -> dict[str | None, str]:
    """The types of RoPE of a rotary module, by type of layer; ``None`` where layers have one."""
    found = getattr(rotary, "rope_type", None)
    if isinstance(found, str):
        return {None: found}
    return dict(found) if isinstance(found, dict) else {}


def _varies(rotary: nn.Module) -> bool:
    return any(kind in (LONG, DYNAMIC) for kind in _types(rotary).values())


class _Traceable(nn.Module):
    """A rotary module of transformers whose frequencies are values of the graph."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        # below transformers' own update, which branches on a value
        self._rotate: Callable[..., tuple[Tensor, Tensor]] = inspect.unwrap(type(rotary).forward)

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[batch, sequence, rotated]`` of ``position_ids [batch, sequence]``,
        in the dtype of ``x``.
        """
        seen = _Frequencies(self.rotary, position_ids.max() + 1)
        given = {} if layer_type is None else {"layer_type": layer_type}
        return self._rotate(seen, x, position_ids, **given)


class _Frequencies:
    """What the forward pass of a rotary module takes for the module."""

    def __init__(self, rotary: nn.Module, length: Tensor) -> None:
        self._rotary = rotary
        self._length = length

    def __getattr__(self, name: str) -> Any:
        for layer_type, kind in _types(self._rotary).items():
            if name == _name(layer_type, "inv_freq"):
                return _selected(self._rotary, kind, layer_type, self._length)
        return getattr(self._rotary, name)


def _name(layer_type: str | None, attribute: str) -> str:
    """What ``attribute`` of the layers of a type is called."""
    return attribute if layer_type is None else f"{layer_type}_{attribute}"


def _selected(rotary: Any, kind: str, layer_type: str | None, length: Tensor) -> Tensor:
    """Frequencies ``[rotated / 2]`` for texts of ``length`` tokens."""
    near: Tensor = getattr(rotary, _name(layer_type, "original_inv_freq"))
    if kind == LONG:
        parameters = rotary.config.rope_parameters
        parameters = parameters if layer_type is None else parameters[layer_type]
        limit = parameters["original_max_position_embeddings"]
        far = _computed(rotary, kind, layer_type, limit + 1)
    elif kind == DYNAMIC:
        limit = rotary.original_max_seq_len
        far = _computed(rotary, kind, layer_type, length)
    else:
        return near
    return torch.where(length > limit, far, near)


def _computed(rotary: Any, kind: str, layer_type: str | None, length: int | Tensor) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {} if layer_type is None else {"layer_type": layer_type}
    found: Tensor = ROPE_INIT_FUNCTIONS[kind](rotary.config, "cpu", seq_len=length, **given)[0]
    return found
