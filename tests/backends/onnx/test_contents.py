"""What a written folder is said to hold is what lies on the disk."""

from __future__ import annotations

import math
from collections import Counter

import onnx

from backends.base import StoredTensor
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import DATA_FILE, MODEL_FILE
from backends.onnx.files import data_ranges
from tests.backends.onnx.conftest import Exported

BITS = {"bool": 8, "int4": 4, "int8": 8, "uint8": 8, "float": 32, "int64": 64}


def contents(exported: Exported) -> list[StoredTensor]:
    return list(OnnxBackend().contents(exported.folder, "ort"))


def test_every_tensor_is_counted_at_its_packed_size(exported: Exported) -> None:
    found = contents(exported)
    assert [tensor.name for tensor in found] == [
        tensor.name for tensor in exported.graph.initializer
    ]
    for tensor in found:
        assert tensor.nbytes == math.ceil(math.prod(tensor.shape) * BITS[tensor.dtype] / 8), (
            tensor.name
        )


def test_external_tensors_take_what_the_graph_says(exported: Exported) -> None:
    sizes = {tensor.name: tensor.nbytes for tensor in contents(exported)}
    lengths = {
        name: place.length
        for name, place in data_ranges(
            onnx.load(exported.folder / MODEL_FILE, load_external_data=False)
        )
    }
    assert {name: sizes[name] for name in lengths} == lengths
    assert sum(lengths.values()) <= (exported.folder / DATA_FILE).stat().st_size


def test_kinds_are_those_of_the_artifact(exported: Exported) -> None:
    products = exported.products
    found = {tensor.name: tensor for tensor in contents(exported)}
    by_kind = Counter(tensor.kind for tensor in found.values())
    assert by_kind["quantized weight"] == len(products)
    for name, (linear, *_) in products.items():
        assert found[f"{name}.weight"].kind == "quantized weight"
        assert found[f"{name}.weight"].dtype == exported.stored_as(linear)
        assert found[f"{name}.weight_scale"].kind == "scale"
    for name, tensor in exported.quantized.floats.items():
        if name in found:
            assert found[name].kind == "float weight", name
            assert math.prod(found[name].shape) == tensor.numel()
    assert (
        by_kind["float weight"]
        >= len([name for name in exported.quantized.floats if name in found])
        > 0
    )
