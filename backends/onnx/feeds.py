"""Inputs of a graph as numpy arrays; the same for every runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor
from torch.nn.functional import pad

from calib.errors import BackendError

CAPACITY = "capacity"
"""What a graph calls the axis of tokens of a cache that is a buffer."""
CACHE = "past_key_values."
"""What the names of the inputs that are caches begin with."""
_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.INT8: torch.int8,
}
"""Dtypes that a cache can have."""


@dataclass(frozen=True)
class CacheInput:
    """One key or value input of a graph: ``[batch, heads, past, head_dim]``.

    Attributes:
        shared: whether it is a buffer with room for the new tokens too, which the graph writes
            into.
    """

    name: str
    dtype: torch.dtype
    heads: int
    head_dim: int
    shared: bool


def cache_inputs(graph: onnx.GraphProto) -> list[CacheInput]:
    """Keys and values that the graph takes, in its own order.

    Raises:
        BackendError: one has another shape or dtype than a cache has.
    """
    caches = []
    for value in graph.input:
        if value.name.startswith(CACHE):
            kind = value.type.tensor_type
            if len(kind.shape.dim) != 4 or kind.elem_type not in _DTYPES:
                raise BackendError(
                    f"the input '{value.name}' of the graph is no cache of keys or values: it has"
                    f" {len(kind.shape.dim)} dimensions of type {kind.elem_type}",
                    hint="the file is damaged or was edited; export the model again",
                )
            _, heads, tokens, width = kind.shape.dim
            shared = tokens.dim_param == CAPACITY
            caches.append(
                CacheInput(
                    value.name, _DTYPES[kind.elem_type], heads.dim_value, width.dim_value, shared
                )
            )
    return caches


def feeds(
    caches: Sequence[CacheInput],
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    past: Sequence[Tensor] | None,
) -> dict[str, Tensor]:
    """What to run a graph on, by input name; see :class:`~backends.base.RuntimeModel`."""
    if past is None:
        batch = input_ids.shape[0]
        past = [
            torch.zeros(batch, cache.heads, 0, cache.head_dim, dtype=cache.dtype)
            for cache in caches
        ]

    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }
    for cache, tensor in zip(caches, past, strict=True):
        room = attention_mask.shape[1] - tensor.shape[2] if cache.shared else 0
        inputs[cache.name] = pad(tensor, (0, 0, 0, room))

    return {name: tensor.contiguous() for name, tensor in inputs.items()}


def whole_row(input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids`` with the mask and the positions of rows without padding."""
    return (
        input_ids,
        torch.ones_like(input_ids),
        torch.arange(input_ids.shape[1]).expand_as(input_ids),
    )
