"""Where the linears of a written graph begin and end, by the names that :mod:`backends.onnx.lower`
gives its nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from backends.onnx.packing import SPLIT, members

_MATMUL = "/MatMul"
_FACTOR = "/Factor"
_FIRST = ("Width", "QuantizeInput", "Order", "Pad", "MatMul")
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
    found: dict[str, Tap] = {}
    for node in graph.node:
        if node.op_type != "MatMul" or not node.name.endswith(_MATMUL) or _FACTOR in node.name:
            continue
        module = node.name.removesuffix(_MATMUL)
        quantized = f"{module}/DequantizeWeight" in named
        if not quantized and node.input[1] not in constants:
            continue
        first = next(named[f"{module}/{label}"] for label in _FIRST if f"{module}/{label}" in named)
        last = named.get(f"{module}{SPLIT}") or named.get(f"{module}/Add", node)
        integer_input = f"{module}/QuantizeInput" in named and f"{module}/Barrier" not in named
        for linear, leaving in zip(members(module), last.output, strict=True):
            found[linear] = Tap(first.input[0], leaving, quantized, not integer_input)
    return found
