"""A written graph without the rounding of what enters its linears: all of it but the one thing that
amplifies.
"""

from __future__ import annotations

import onnx

from backends.onnx.names import Label, linear_of

_FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
)
_ROUNDING = ("QuantizeLinear", "DynamicQuantize")
"""How operators that round end; DequantizeLinear ends otherwise."""


def rounds_inputs_only(graph: onnx.GraphProto) -> bool:
    """Whether everything that ``graph`` rounds on the way is the input of a linear, in a static
    pair: a cache in float, and no limits that are computed while running.
    """
    pairs = _pairs(graph)
    caches = [value for value in graph.input if value.name.startswith("past_key_values.")]
    rounding = [node for node in graph.node if node.op_type.endswith(_ROUNDING)]
    return (
        bool(pairs)
        and all(value.type.tensor_type.elem_type in _FLOATS for value in caches)
        and all(node.output[0] in pairs for node in rounding)
    )


def without_rounding(graph: onnx.GraphProto) -> None:
    """Let the readers of every rounded input read the input itself; ``graph`` is changed."""
    pairs = _pairs(graph)
    entering = {
        node.output[0]: pairs[node.input[0]].input[0]
        for node in graph.node
        if linear_of(node.name, Label.DEQUANTIZE_INPUT) is not None and node.input[0] in pairs
    }
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in entering:
                node.input[index] = entering[name]


def _pairs(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Static quantizers of the inputs of linears, by their output."""
    return {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "QuantizeLinear"
        and linear_of(node.name, Label.QUANTIZE_INPUT) is not None
    }
