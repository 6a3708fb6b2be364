"""A float prefix in a graph: constant keys and values before those of the text.

    position_ids + p  ->  everything that read position_ids
    attention(q, K, V, mask)  ->  attention(q, [K_p, K], [V_p, V], [true, mask])

Inputs and outputs are those of a graph without one: who runs it numbers positions from 0, gives a
mask of its own tokens, and gets their keys and values back. What it means is in
:mod:`calib.network.prefix`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from torch import Tensor

from backends.onnx.nodes import constant
from calib.artifact import Prefix

_POSITIONS = "position_ids"


@dataclass(frozen=True)
class Constants:
    """Keys and values of one layer's prefix.

    Attributes:
        keys: ``[1, kv_heads, p, d]``.
        values: likewise.
        length: p.
    """

    keys: ir.Value
    values: ir.Value
    length: int


def move_positions(graph: ir.Graph, prefix: Prefix) -> None:
    """Let whatever reads the positions of ``graph`` read them moved by the length of ``prefix``."""
    positions = next(value for value in graph.inputs if value.name == _POSITIONS)
    readers = list(positions.uses())
    if not readers:
        return
    builder = tape.Tape()
    length = constant(graph, "prefix.length", np.array(prefix.length, np.int64))
    moved = builder.op("Add", [positions, length], name="prefix/Positions")
    moved.shape, moved.type = positions.shape, positions.type
    for node, index in readers:
        node.replace_input_with(index, moved)
    graph.insert_before(graph[0], list(builder.nodes))


def constants(graph: ir.Graph, prefix: Prefix, layer: int, dtype: ir.DataType) -> Constants:
    """The prefix of ``layer`` as initializers of ``graph``."""

    def held(part: str, tensor: Tensor) -> ir.Value:
        array = tensor.float().numpy()[None]
        return constant(graph, f"prefix.{layer}.{part}", array, dtype)

    keys, values = held("key", prefix.keys[layer]), held("value", prefix.values[layer])
    return Constants(keys, values, prefix.length)
