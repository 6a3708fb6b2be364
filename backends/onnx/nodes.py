"""Putting nodes in the place of others, and small constants that a graph holds once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

Attribute = int | float | str | Sequence[int]
"""What the attributes of our nodes are."""


def integers(graph: ir.Graph, dims: Sequence[int]) -> ir.Value:
    """The int64 constant ``[len(dims)]``."""
    name = "integers." + "_".join(str(dim) for dim in dims)
    return constant(graph, name, np.array(dims, dtype=np.int64))


def constant(
    graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None
) -> ir.Value:
    """The constant called ``name``, made on first use.

    Args:
        graph: gets it as an initializer.
        name: of it; whoever asks for the same name must mean the same values.
        array: its values.
        dtype: where that is not the array's own.
    """
    if name in graph.initializers:
        return graph.initializers[name]

    tensor = ir.tensor(
        array if dtype is None else array.astype(dtype.numpy()), dtype=dtype, name=name
    )
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)

    return value


def replace(graph: ir.Graph, node: ir.Node, builder: tape.Tape, output: ir.Value) -> None:
    """Put the nodes of ``builder`` in the place of ``node``; ``output`` takes over name, type and
    readers.
    """
    old = node.outputs[0]
    output.shape, output.type, output.name = old.shape, old.type, old.name
    graph.insert_before(node, list(builder.nodes))
    ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def size(value: ir.Value, axis: int) -> int:
    """How much ``value`` holds along an axis whose size the config fixes."""
    assert value.shape is not None
    extent = value.shape[axis]
    assert isinstance(extent, int)
    return extent
