"""The quantized KV cache in the graph.

    past_key_values int8 ---------------+
                                        Concat -> present int8 -> DequantizeLinear -> attention
    new keys -> Add(0) -> QuantizeLinear +

Everything that attention reads has been through the cache's format, the new token's own keys as
well, which is what :mod:`calib.network.kv_cache` rounds.

The addition of a vector of zeros keeps ONNX Runtime from moving the QuantizeLinear up to the
projection, where it has no kernel for the two and would dequantize the projection's weight on every
run.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from torch import Tensor

from backends.onnx.linear_nodes import STORAGE
from backends.onnx.nodes import constant, size
from calib.artifact import QuantizedCache
from calib.errors import BackendError


def quantize_cache(model: ir.Model, cache: QuantizedCache) -> None:
    """Store keys and values of ``model`` as ``cache`` says, in place: inputs and outputs change
    their dtype.

    Raises:
        BackendError: keys or values are not appended to the past by one Concat.
    """
    storage = STORAGE[cache.scheme.format.name]
    for layer, key_scale in cache.key_scale.items():
        for part, scale in (("key", key_scale), ("value", cache.value_scale[layer])):
            _quantize(model.graph, f"{layer}.{part}", scale, storage)


def _quantize(graph: ir.Graph, name: str, scale: Tensor, storage: ir.DataType) -> None:
    concat, past, new, present = _appended(graph, name)
    assert new.dtype is not None
    label, width = f"kv_cache.{name}", size(new, 3)
    step = constant(graph, f"{label}_scale", scale.float().numpy(), new.dtype)
    assert step.const_value is not None

    if not 0 < float(step.const_value.numpy()) < float("inf"):
        raise BackendError(
            f"the scale of the cached '{name}' is {float(scale):g}, which {new.dtype.name} does not"
            " hold",
            hint="calibrate the model in the dtype of the target, or leave --kv out",
        )

    zero = constant(graph, f"kv_cache.zero_point.{storage.name}", np.array(0), storage)
    nothing = constant(graph, f"kv_cache.barrier.{width}", np.zeros(width), new.dtype)
    readers = list(present.uses())

    # the new tokens are rounded before the Concat, and everything is read behind it
    before, after = tape.Tape(), tape.Tape()
    kept_apart = before.op("Add", [new, nothing], name=f"{label}/Barrier")
    stored = before.op("QuantizeLinear", [kept_apart, step, zero], name=f"{label}/Quantize")
    read = after.op("DequantizeLinear", [present, step, zero], name=f"{label}/Dequantize")
    stored.shape, read.shape, read.type = new.shape, present.shape, present.type

    # input, appended tokens and output hold integers; readers see floats, as before
    for value in (past, stored, present):
        value.type = ir.TensorType(storage)
    for reader, index in readers:
        reader.replace_input_with(index, read)

    concat.replace_input_with(1, stored)
    graph.insert_before(concat, list(before.nodes))
    graph.insert_after(concat, list(after.nodes))


def _appended(graph: ir.Graph, name: str) -> tuple[ir.Node, ir.Value, ir.Value, ir.Value]:
    """The Concat of past and new keys or values, its two inputs and its output."""
    present = next((value for value in graph.outputs if value.name == f"present.{name}"), None)
    concat = None if present is None else present.producer()
    if (
        present is not None
        and concat is not None
        and concat.op_type == "Concat"
        and len(concat.inputs) == 2
    ):
        past, new = concat.inputs
        if past is not None and new is not None and past.is_graph_input():
            return concat, past, new, present

    raise BackendError(
        f"the cache of '{name}' cannot be quantized: the model does not append to it",
        hint="leave --kv out",
    )
