"""Reading quantized linears back from a written graph, in the artifact's own orientation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from backends.onnx.runner import read_proto
from backends.onnx.write import METADATA_KEY
from calib.artifact import QuantizedLinear
from calib.errors import BackendError
from calib.schemes import PerBlock, tensor_scheme_from_dict


def read_linears(path: Path) -> Mapping[str, QuantizedLinear]:
    """Every quantized linear of the graph at ``path``, by module name.

    Raises:
        BackendError: the file is missing, damaged, or was not written by rotq.
    """
    proto = read_proto(path)
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
        entries = json.loads(model.metadata_props[METADATA_KEY])
        return {name: _linear(model.graph, name, entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError) as error:
        raise BackendError(
            f"'{path}' or its data is damaged, or not a graph of rotq: {error}", hint="export the model again"
        ) from error


def _linear(graph: ir.Graph, name: str, entry: Mapping[str, Any]) -> QuantizedLinear:
    weight_scheme = tensor_scheme_from_dict(entry["weight"])
    nodes = {node.name: node for node in graph}
    product = nodes[f"{name}/MatMul"]
    weight_node = nodes[f"{name}/DequantizeWeight"]
    bias_node = nodes.get(f"{name}/Add")
    scale = _constant(weight_node, 1)
    activation = product.inputs[0]
    producer = activation.producer() if activation is not None else None
    order = None
    if producer is not None and producer.name == f"{name}/Order":
        order, activation = _constant(producer, 1), producer.inputs[0]
        producer = activation.producer() if activation is not None else None
    static = producer is not None and producer.op_type == "DequantizeLinear"
    return QuantizedLinear(
        name=name,
        weight=_constant(weight_node, 0).T.contiguous(),
        weight_scale=scale.T.contiguous() if isinstance(weight_scheme.granularity, PerBlock) else scale,
        weight_scheme=weight_scheme,
        bias=None if bias_node is None else _constant(bias_node, 1),
        input_scheme=None if entry["input"] is None else tensor_scheme_from_dict(entry["input"]),
        input_scale=_constant(producer, 1) if static and producer is not None else None,
        online_rotation=entry["online_rotation"],
        weight_order=order,
    )


def _constant(node: ir.Node, index: int) -> Tensor:
    value = node.inputs[index]
    if value is None or value.const_value is None:
        raise ValueError(f"input {index} of node '{node.name}' is not a constant")
    array = value.const_value.numpy()
    if value.const_value.dtype == ir.DataType.INT4:
        array = array.astype("int8")
    return torch.from_numpy(array.copy())
