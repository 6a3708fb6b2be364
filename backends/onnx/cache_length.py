"""A cache is as long as the mask says, not as what it holds.

    T = length of attention_mask,  S = tokens that come in,  P = rows of past_key_values

A runtime that keeps its own count of tokens can hand over fewer rows than it counted: after a turn
of a chat, onnxruntime-genai counts the last token that it generated, and has never run it. Such a
graph goes on, with rows of zeros for the tokens that it never saw, as the kernel of
onnxruntime-genai's own graphs does in a buffer of zeros:

    present = [past, 0, new],  P + (T - S - P) + S rows;  where T = P + S, as ever, the 0 has none
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from backends.onnx.feeds import CACHE
from backends.onnx.nodes import integers, size

TOKENS = 2
"""The axis of tokens in a cache."""


def appends(node: ir.Node) -> bool:
    """Whether ``node`` appends to a cache that comes in, and its output is the cache that goes
    out.
    """
    past = node.inputs[0] if node.op_type == "Concat" else None
    return (
        past is not None and str(past.name).startswith(CACHE) and node.outputs[0].is_graph_output()
    )


def count_by_mask(graph: ir.Graph, before: ir.Value) -> None:
    """Give whatever asked a cache for its length ``before``, T - S ``[1]``, in place."""
    for node in list(graph):
        past = node.inputs[0] if node.op_type == "Shape" else None
        if (
            past is not None
            and str(past.name).startswith(CACHE)
            and node.attributes.get_int("start", 0) == TOKENS
        ):
            ir.convenience.replace_all_uses_with(node.outputs[0], before)


def leave_room(model: ir.Model) -> None:
    """Let the caches of ``model`` grow to the length of the mask, in place."""
    graph = model.graph
    growing = [node for node in graph if appends(node)]
    if not growing:
        return
    given = {value.name: value for value in graph.inputs}
    first, builder = next(iter(graph)), tape.Tape()

    def op(kind: str, inputs: Sequence[ir.Value], label: str, **attributes: Any) -> ir.Value:
        return builder.op(kind, list(inputs), attributes, name=f"kv_cache/{label}")

    total = op("Shape", [given["attention_mask"]], "Total", start=1, end=2)
    sequence = op("Shape", [given["input_ids"]], "Sequence", start=1, end=2)
    before = op("Sub", [total, sequence], "Before")
    count_by_mask(graph, before)

    past = _past(growing[0])
    rows = op("Shape", [past], "Rows", start=0, end=1)
    held = op("Shape", [past], "Held", start=TOKENS, end=TOKENS + 1)
    unseen = op("Sub", [before, held], "Unseen")
    gaps: dict[tuple[int, int, ir.DataType], ir.Value] = {}
    for node in growing:
        past = _past(node)
        heads, width, dtype = size(past, 1), size(past, 3), past.dtype
        assert dtype is not None
        kind = (heads, width, dtype)
        if kind not in gaps:
            label = f"{heads}x{width}.{dtype.name}"
            dims = [rows, integers(graph, (heads,)), unseen, integers(graph, (width,))]
            shape = op("Concat", dims, f"Shape.{label}", axis=0)
            zero = ir.tensor(np.zeros(1, dtype.numpy()), dtype=dtype)
            gaps[kind] = op("ConstantOfShape", [shape], f"Gap.{label}", value=zero)
        node.resize_inputs(3)
        node.replace_input_with(2, node.inputs[1])
        node.replace_input_with(1, gaps[kind])
    graph.insert_before(first, list(builder.nodes))


def _past(concat: ir.Node) -> ir.Value:
    past = concat.inputs[0]
    assert past is not None
    return past
