"""``rotq::Attention`` as standard operators.

    q [B, heads, S, d], k and v [B, kv_heads, T, d], mask bool [B, 1, S, T], heads = kv_heads * G

    q -> Reshape [B, kv_heads, G S, d] -> MatMul (scale * k^T) -> Reshape [B, heads, S, T] -> (cap) -> Add bias
      -> Max with the row's largest - 70 -> Softmax -> Reshape [B, kv_heads, G S, T] -> MatMul v
      -> Reshape [B, heads, S, d] -> Transpose [B, S, heads, d]

The G query heads that share a key head are rows of one product, so keys and values are never expanded to all heads, and
the Reshapes move no data. On a CPU this was faster than every attention operator, fused or standard, and every runtime
takes it.

The Max changes no weight by more than e^-70 = 4e-31, which is far below what float32 resolves. Without it the weights
of keys that are not seen, or hardly, come out of a CPU's exponential as denormal numbers, on which the product with v
is up to 100 times slower.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from backends.onnx.nodes import constant, integers, replace, size
from backends.onnx.placeholders import ATTENTION, DOMAIN, SCALE_ATTRIBUTE, SOFTCAP_ATTRIBUTE

_DEPTH = 70.0


def lower_attention(model: ir.Model) -> None:
    """Replace every attention placeholder of ``model``, in place."""
    masks: dict[str, _Mask] = {}
    for index, node in enumerate([n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, ATTENTION)]):
        _expand(model.graph, node, f"attention.{index}", masks)


class _Mask:
    """What the layers that share a mask share: the bias, and the sizes of sequence and cache."""

    def __init__(self, graph: ir.Graph, before: ir.Node, mask: ir.Value, dtype: ir.DataType) -> None:
        builder = tape.Tape()
        # Half of the smallest number: added to a score it stays finite. With -inf, the row of a padded query, which
        # sees no key, would become NaN and spread through its values.
        lowest = float(np.finfo(dtype.numpy()).min) / 2
        hidden = constant(graph, f"attention.hidden.{dtype.name}", np.array(lowest, dtype.numpy()))
        seen = constant(graph, f"attention.seen.{dtype.name}", np.array(0, dtype.numpy()))
        self.bias = builder.op("Where", [mask, seen, hidden], name=f"{mask.name}/Bias")
        self.sequence = builder.op("Shape", [mask], {"start": 2, "end": 3}, name=f"{mask.name}/Sequence")
        self.total = builder.op("Shape", [mask], {"start": 3, "end": 4}, name=f"{mask.name}/Total")
        graph.insert_before(before, list(builder.nodes))


def _expand(graph: ir.Graph, node: ir.Node, name: str, masks: dict[str, _Mask]) -> None:
    query, key, value, mask = (_given(node, index) for index in range(4))
    heads, kv_heads, width = size(query, 1), size(key, 1), size(value, 3)
    dtype, scale = query.dtype, node.attributes[SCALE_ATTRIBUTE].as_float()
    assert dtype is not None
    assert mask.name is not None
    if mask.name not in masks:
        masks[mask.name] = _Mask(graph, node, mask, dtype)
    shared = masks[mask.name]
    builder = tape.Tape()

    def op(kind: str, inputs: list[ir.Value], label: str, **attributes: Any) -> ir.Value:
        return builder.op(kind, inputs, attributes, name=f"{name}/{label}")

    def scalar(label: str, number: float) -> ir.Value:
        return constant(graph, f"attention.{label}.{number!r}.{dtype.name}", np.array(number, dtype.numpy()))

    grouped = heads != kv_heads
    rows = op("Reshape", [query, integers(graph, (0, kv_heads, -1, size(query, 3)))], "Group") if grouped else query
    keys = op("Transpose", [op("Mul", [key, scalar("scale", scale)], "Scale")], "Keys", perm=[0, 1, 3, 2])
    scores = op("MatMul", [rows, keys], "Scores")
    if grouped:
        apart = op("Concat", [integers(graph, (0, heads)), shared.sequence, integers(graph, (-1,))], "Heads", axis=0)
        scores = op("Reshape", [scores, apart], "Ungroup")
    if SOFTCAP_ATTRIBUTE in node.attributes:
        cap = scalar("cap", node.attributes[SOFTCAP_ATTRIBUTE].as_float())
        scores = op("Mul", [op("Tanh", [op("Div", [scores, cap], "Divide")], "Tanh"), cap], "Cap")
    scores = op("Add", [scores, shared.bias], "Mask")
    if dtype == ir.DataType.FLOAT:  # what computes in fewer bits is no CPU, and fuses attention without the Max
        largest = op("ReduceMax", [scores, integers(graph, (-1,))], "Largest", keepdims=1)
        scores = op("Max", [scores, op("Sub", [largest, scalar("depth", _DEPTH)], "Least")], "Clamp")
    weights = op("Softmax", [scores], "Softmax", axis=-1)
    if grouped:
        together = op("Concat", [integers(graph, (0, kv_heads, -1)), shared.total], "Groups", axis=0)
        weights = op("Reshape", [weights, together], "Regroup")
    mixed = op("MatMul", [weights, value], "Values")
    if grouped:
        mixed = op("Reshape", [mixed, integers(graph, (0, heads, -1, width))], "Split")
    replace(graph, node, builder, op("Transpose", [mixed], "Output", perm=[0, 2, 1, 3]))


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # a placeholder has all its inputs
    return value
