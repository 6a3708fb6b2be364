"""Changes of ONNX graphs as protobuf: what a parser takes and a reader does not expect."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from tests.fuzz.mutations import mutate_bytes, mutate_json

_LOCATIONS = (
    "",
    ".",
    "..",
    "../model.onnx.data",
    "/etc/passwd",
    "model.onnx",
    "nothing",
    "a/b",
    "\0",
)
_NUMBERS = ("", "-1", "x", "0", "1", "99999999999999999999999", "540672", "1e3", " 7")
_DIMS = (0, -1, 1, 2, 3, 7, 2**31, 2**62)


def mutate_onnx(data: bytes, rng: Random) -> bytes:
    """A graph, changed as bytes or as what it says."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return mutate_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(_WAYS)(model, rng)
    return bytes(model.SerializeToString())


def _drop_node(model: Any, rng: Random) -> None:
    if model.graph.node:
        del model.graph.node[rng.randrange(len(model.graph.node))]


def _node(model: Any, rng: Random) -> None:
    if not model.graph.node:
        return
    node = rng.choice(model.graph.node)
    match rng.randrange(5):
        case 0:
            node.name = rng.choice(model.graph.node).name
        case 1:
            node.op_type = rng.choice(model.graph.node).op_type
        case 2 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(("", "nothing", "input_ids"))
        case 3 if node.input:
            del node.input[-1]
        case 4 if node.attribute:
            rng.choice(node.attribute).type = rng.randrange(14)


def _initializer(model: Any, rng: Random) -> None:
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    match rng.randrange(6):
        case 0:
            tensor.data_type = rng.randrange(-1, 27)
        case 1 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_DIMS)
        case 2:
            tensor.dims.append(rng.choice(_DIMS))
        case 3:
            tensor.name = rng.choice(model.graph.initializer).name
        case 4:
            tensor.raw_data = rng.randbytes(rng.choice((0, 1, 64)))
        case 5:
            tensor.data_location = rng.randrange(2)


def _external(model: Any, rng: Random) -> None:
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if not tensors:
        return
    tensor = rng.choice(tensors)
    entry = rng.choice(tensor.external_data)
    if rng.random() < 0.2:
        del tensor.external_data[:]
    elif entry.key == "location":
        entry.value = rng.choice(_LOCATIONS)
    else:
        entry.value = rng.choice(_NUMBERS)


def _metadata(model: Any, rng: Random) -> None:
    if not model.metadata_props:
        return
    entry = rng.choice(model.metadata_props)
    if rng.random() < 0.1:
        entry.key = "other"
    else:
        entry.value = mutate_json(entry.value.encode(), rng).decode(errors="replace")


def _value(model: Any, rng: Random) -> None:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if not values:
        return
    value = rng.choice(values)
    match rng.randrange(3):
        case 0:
            value.name = rng.choice(values).name
        case 1:
            value.type.tensor_type.elem_type = rng.randrange(-1, 27)
        case 2:
            value.type.Clear()


def _whole(model: Any, rng: Random) -> None:
    match rng.randrange(4):
        case 0:
            model.ir_version = rng.choice((0, 1, 99))
        case 1:
            del model.opset_import[:]
        case 2:
            model.graph.Clear()
        case 3:
            del model.graph.output[:]


_WAYS: tuple[Callable[[Any, Random], None], ...] = (
    *(_drop_node, _node, _initializer, _initializer, _external, _external, _metadata, _metadata),
    *(_value, _whole),
)
