"""Reading quantized linears and the cache back from a written graph, in the artifact's own
orientation.

Nodes are found by the names that :mod:`backends.onnx.lower` gave them; what is no tensor is in the
graph's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from backends.onnx.embeddings import read_embedding
from backends.onnx.files import follow_links, read_proto
from backends.onnx.linear_nodes import UNSIGNED_ZERO
from backends.onnx.names import (
    CACHE_METADATA_KEY,
    METADATA_KEY,
    Label,
    Part,
    linear_of,
    members,
    node_name,
)
from backends.onnx.packing import unpacked
from backends.onnx.weights import E8M0_BIAS, turned
from calib.artifact import QuantizedCache, QuantizedLinear
from calib.artifact.files import cache_key
from calib.errors import BackendError
from calib.files.reading import MALFORMED, reason_of
from calib.schemes import INT8, TensorScheme, tensor_scheme_from_dict

_Read = TypeVar("_Read")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def read_linears(path: Path) -> Mapping[str, QuantizedLinear]:
    """Every quantized linear of the graph at ``path``, by module name.

    Raises:
        BackendError: the file is missing, damaged, or was not written by rotq.
    """

    def read(model: ir.Model) -> Mapping[str, QuantizedLinear]:
        nodes = {node.name: node for node in model.graph if node.name is not None}
        entries = json.loads(model.metadata_props[METADATA_KEY])
        linears = {linear.name: linear for linear in _linears(model.graph, nodes, entries)}
        return {name: linears[name] for name in entries}

    return _opened(path, read)


def read_cache(path: Path) -> QuantizedCache | None:
    """The quantized KV cache of the graph at ``path``; ``None`` where it is in float.

    Raises:
        BackendError: as for :func:`read_linears`.
    """

    def read(model: ir.Model) -> QuantizedCache | None:
        if CACHE_METADATA_KEY not in model.metadata_props:
            return None
        entry = json.loads(model.metadata_props[CACHE_METADATA_KEY])
        key, value = (
            {
                layer: _tensor(model.graph.initializers[cache_key(layer, part)])
                for layer in entry["layers"]
            }
            for part in ("key", "value")
        )
        return QuantizedCache(tensor_scheme_from_dict(entry["scheme"]), key, value)

    return _opened(path, read)


def read_floats(path: Path) -> Mapping[str, Tensor]:
    """The float initializers of the graph at ``path`` that have the name of a parameter, weights of
    linears ``[in, out]``; those of quantized linears, and of linears packed into one, are left out.

    Raises:
        BackendError: as for :func:`read_linears`.
    """

    def read(model: ir.Model) -> Mapping[str, Tensor]:
        quantized = json.loads(model.metadata_props.get(METADATA_KEY, "{}"))
        floats = {}
        for name, value in model.graph.initializers.items():
            module, _, part = name.rpartition(".")
            own = module not in quantized and len(members(module)) == 1
            if own and part in (Part.WEIGHT, Part.BIAS) and value.dtype in _FLOATS:
                floats[name] = _tensor(value)
        return floats

    return _opened(path, read)


def _opened(path: Path, read: Callable[[ir.Model], _Read]) -> _Read:
    proto = read_proto(path)
    try:
        return read(_with_data(path, proto))
    # what onnx_ir makes of fields that do not fit each other
    except (OSError, *MALFORMED) as error:
        raise BackendError(
            f"'{path}' or its data is damaged, or not a graph of rotq: {reason_of(error)}",
            hint="export the model again",
        ) from error


def _with_data(path: Path, proto: onnx.ModelProto) -> ir.Model:
    """The graph at ``path`` with its data; ``proto`` is used up."""
    folders = follow_links(path, proto)
    model = ir.from_proto(proto)
    for name, folder in folders.items():
        constant = model.graph.initializers[name].const_value
        assert isinstance(constant, ir.ExternalTensor)
        constant.base_dir = folder
    return model


def _linears(
    graph: ir.Graph, nodes: Mapping[str, ir.Node], entries: Mapping[str, Mapping[str, Any]]
) -> Iterator[QuantizedLinear]:
    """Those that are one MatMul in the graph have the same description."""
    packs = {
        pack: members(pack)
        for node in nodes
        if (pack := linear_of(node, Label.SPLIT)) is not None and len(members(pack)) > 1
    }
    together = {name for names in packs.values() for name in names}
    for name in entries.keys() - together:
        yield _linear(graph, nodes, name, entries[name])
    for pack, names in packs.items():
        whole = _linear(graph, nodes, pack, entries[names[0]])
        yield from unpacked(whole, _Parts(nodes, pack).need(Label.SPLIT, 1).tolist())


def _linear(
    graph: ir.Graph, nodes: Mapping[str, ir.Node], name: str, entry: Mapping[str, Any]
) -> QuantizedLinear:
    weight = tensor_scheme_from_dict(entry["weight"])
    inputs = None if entry["input"] is None else tensor_scheme_from_dict(entry["input"])
    if node_name(name, Label.MATMUL) not in nodes:
        return read_embedding(graph, name, entry, weight)

    parts = _Parts(nodes, name)
    second = parts.get(Label.DEQUANTIZE_WEIGHT_SCALE, 1)
    scale = (
        parts.need(Label.DEQUANTIZE_WEIGHT, 1)
        if second is None
        else parts.need(Label.DEQUANTIZE_WEIGHT_SCALE, 0)
    )
    codes = parts.need(Label.DEQUANTIZE_WEIGHT, 0)
    points = _points(parts, Label.DEQUANTIZE_WEIGHT, weight, scale)
    input_scale = parts.get(Label.QUANTIZE_INPUT, 1)

    return QuantizedLinear(
        name=name,
        weight=_without_padding(_signed(codes, weight).T, parts.get(Label.PAD, 1)),
        weight_scale=_scale_values(turned(scale, weight.granularity), weight),
        weight_scheme=weight,
        bias=parts.get(Label.ADD, 1),
        input_scheme=inputs,
        input_scale=input_scale,
        online_rotation=entry["online_rotation"],
        weight_zero_point=None
        if points is None
        else turned(points, weight.granularity).contiguous(),
        weight_second_scale=second,
        weight_order=parts.get(Label.ORDER, 1),
        input_zero_point=_points(parts, Label.QUANTIZE_INPUT, inputs, input_scale),
    )


class _Parts:
    """The constants that the nodes of one linear read."""

    def __init__(self, nodes: Mapping[str, ir.Node], name: str) -> None:
        self._nodes = nodes
        self._name = name

    def get(self, label: Label, index: int) -> Tensor | None:
        """Input ``index`` of the node ``label``; ``None`` where there is no such node or input."""
        node = self._nodes.get(node_name(self._name, label))
        if node is None or index >= len(node.inputs):
            return None
        value = node.inputs[index]
        return None if value is None else _tensor(value)

    def need(self, label: Label, index: int) -> Tensor:
        """The same of a node that every linear of this kind has."""
        tensor = self.get(label, index)
        if tensor is None:
            raise ValueError(f"the linear '{self._name}' has no {label}")
        return tensor


def _without_padding(weight: Tensor, pads: Tensor | None) -> Tensor:
    """``[out, in]`` of ``[out, rows]``; the last of ``pads`` counts the rows that were added."""
    return (weight if pads is None else weight[:, : weight.shape[1] - int(pads[-1])]).contiguous()


def _scale_values(stored: Tensor, scheme: TensorScheme) -> Tensor:
    match scheme.scale_format:
        case "e4m3":
            return stored.float().contiguous()
        case "e8m0" | "e8m0-floor":
            return torch.exp2(stored.float() - E8M0_BIAS).contiguous()
    return stored.contiguous()


def _signed(codes: Tensor, scheme: TensorScheme) -> Tensor:
    """``codes``, which may be int8 stored in uint8."""
    unsigned = scheme.format == INT8 and codes.dtype == torch.uint8
    return (codes ^ UNSIGNED_ZERO).view(torch.int8) if unsigned else codes


def _points(
    parts: _Parts, label: Label, scheme: TensorScheme | None, scale: Tensor | None
) -> Tensor | None:
    """The zero points of a quantizer ``label`` that has any of its own, in the dtype of ``scale``,
    as they are beside signed integers.
    """
    if scheme is None or scheme.symmetric or scale is None:
        return None
    points = parts.need(label, 2)
    return points.to(scale.dtype) - (UNSIGNED_ZERO if points.dtype == torch.uint8 else 0)


def _tensor(value: ir.Value) -> Tensor:
    """The constant ``value``; INT4 in int8, and FLOAT4E2M1 as codes in uint8."""
    constant = value.const_value
    if constant is None:
        raise ValueError(f"'{value.name}' is not a constant")
    array = constant.numpy()
    match constant.dtype:
        case ir.DataType.INT4:
            return torch.from_numpy(array.astype("int8"))
        case ir.DataType.FLOAT4E2M1:
            return torch.from_numpy(array.view("uint8").copy())
        case ir.DataType.FLOAT8E4M3FN:
            return torch.from_numpy(array.view("uint8").copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(array.copy())
