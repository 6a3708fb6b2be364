"""A float prefix in a graph: constant keys and values before those of the text.

    position_ids + p  ->  everything that read position_ids
    attention(q, K, V, mask)  ->  attention(q, [K_p, K], [V_p, V], [seen, mask])

Inputs and outputs are those of a graph without one: who runs it numbers positions from 0, gives a
mask of its own tokens, and gets their keys and values back. What it means is in
:mod:`calib.network.prefix`.

The same attention in two ways:

    s = q [K_p, K]^T,      o = softmax(s) [V_p, V]
    s = [q K_p^T, q K^T],  o = w_p V_p + w V,  [w_p, w] = softmax(s)

The first copies keys and values, 2 T kv_heads d numbers, and the second scores and weights,
2 T heads S, for S queries over T tokens. So a graph takes the second for one token at a time, which
then costs the same however long the text is, and the first for prompts. A runtime without branches
gets the first alone, which leaves attention in the form that it may fuse.
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
        scaled: ``[1, kv_heads, d, p]``, the keys times the scale of the scores, to multiply queries
            with.
        values: as the keys.
    """

    keys: ir.Value
    scaled: ir.Value
    values: ir.Value

    def in_front(
        self, nodes: tape.Tape, name: str, rows: ir.Value, key: ir.Value, value: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Keys and values of prefix and text, ``[B, kv_heads, p + T, d]``.

        Args:
            nodes: gets the nodes.
            name: what their names begin with.
            rows: ``[4]``, B and three ones.
            key: of the text, ``[B, kv_heads, T, d]``.
            value: likewise.
        """

        def joined(before: ir.Value, text: ir.Value, label: str) -> ir.Value:
            repeated = nodes.op("Expand", [before, rows], name=f"{name}/{label}Rows")
            return nodes.op("Concat", [repeated, text], {"axis": 2}, name=f"{name}/{label}Together")

        return joined(self.keys, key, "Key"), joined(self.values, value, "Value")


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


def constants(
    graph: ir.Graph, prefix: Prefix, layer: int, dtype: ir.DataType, scale: float
) -> Constants:
    """The prefix of ``layer`` as initializers of ``graph``; ``scale`` is that of its scores."""

    def held(part: str, tensor: Tensor) -> ir.Value:
        array = np.ascontiguousarray(tensor.float().numpy()[None])
        return constant(graph, f"prefix.{layer}.{part}", array, dtype)

    keys, values = prefix.keys[layer], prefix.values[layer]
    return Constants(
        keys=held("key", keys),
        scaled=held("scaled_key", keys.float().transpose(-1, -2) * scale),
        values=held("value", values),
    )
