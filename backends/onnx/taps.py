"""Where the linears of a written graph begin and end, by the names that :mod:`backends.onnx.lower`
gives its nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from backends.onnx.names import ROTATION_FACTOR, Label, linear_of, members, node_name

_FIRST = (Label.WIDTH, Label.QUANTIZE_INPUT, Label.ORDER, Label.PAD, Label.MATMUL)
"""The first of these that a linear has takes its input, after any online rotation."""


@dataclass(frozen=True)
class Tap:
    """One linear of a graph.

    Attributes:
        entering: the value that enters its quantizer, or its MatMul.
        leaving: the value that leaves it, bias included.
        quantized: whether its weight is stored quantized.
        multiplies_floats: whether its MatMul takes floats as the graph has it. Runtimes may round
            these to integers.
    """

    entering: str
    leaving: str
    quantized: bool
    multiplies_floats: bool


def taps(graph: onnx.GraphProto) -> dict[str, Tap]:
    """The linears of ``graph`` by module name, quantized and float ones."""
    named = {node.name: node for node in graph.node}
    constants = {tensor.name for tensor in graph.initializer}
    by_module: dict[str, Tap] = {}
    for node in graph.node:
        linear = linear_of(node.name, Label.MATMUL)
        if node.op_type != "MatMul" or linear is None or f"/{ROTATION_FACTOR}" in node.name:
            continue

        own = {label: named[name] for label in Label if (name := node_name(linear, label)) in named}
        quantized = Label.DEQUANTIZE_WEIGHT in own
        if not quantized and node.input[1] not in constants:
            continue

        first = next(own[label] for label in _FIRST if label in own)
        last = own.get(Label.SPLIT) or own.get(Label.ADD, node)
        integer_input = Label.QUANTIZE_INPUT in own and Label.BARRIER not in own
        for name, leaving in zip(members(linear), last.output, strict=True):
            by_module[name] = Tap(first.input[0], leaving, quantized, not integer_input)
    return by_module
