"""Inputs of a graph as numpy arrays; the same for every runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

_CACHE = "past_key_values."
_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.INT8: torch.int8,
}
"""Dtypes that a cache can have."""


@dataclass(frozen=True)
class CacheInput:
    """One key or value input of a graph: ``[batch, heads, past, head_dim]``."""

    name: str
    dtype: torch.dtype
    heads: int
    head_dim: int


def cache_inputs(graph: onnx.GraphProto) -> list[CacheInput]:
    """Keys and values that the graph takes, in its own order."""
    found = []
    for value in graph.input:
        if value.name.startswith(_CACHE):
            kind = value.type.tensor_type
            axes = [dim.dim_value for dim in kind.shape.dim]
            found.append(CacheInput(value.name, _DTYPES[kind.elem_type], axes[1], axes[3]))
    return found


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
        past = [torch.zeros(batch, cache.heads, 0, cache.head_dim, dtype=cache.dtype) for cache in caches]
    found = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    found |= {cache.name: tensor for cache, tensor in zip(caches, past, strict=True)}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def whole_row(input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids`` with the mask and the positions of rows without padding."""
    return input_ids, torch.ones_like(input_ids), torch.arange(input_ids.shape[1]).expand_as(input_ids)
