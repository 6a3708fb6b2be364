"""What is in a written graph: the form that every runtime reads, and nothing else."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import DATA_FILE, GENAI_FILE, MODEL_FILE
from backends.onnx.rotary import ROTARY_OPSET
from calib.rotations.hadamard import block_order, factor_order
from calib.schemes import PerBlock
from tests.backends.onnx.conftest import CASES, Exported

INLINE_BYTES = 1024
FIXED_INPUTS = ["input_ids", "attention_mask", "position_ids"]


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def initializers(exported: Exported) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in exported.graph.initializer}


def values_of(exported: Exported, *names: str) -> Iterator[np.ndarray]:
    found = initializers(exported)
    for name in names:
        yield numpy_helper.to_array(found[name], base_dir=str(exported.folder))


def test_the_checker_passes_and_only_the_standard_domain_is_used(exported: Exported) -> None:
    path = exported.folder / MODEL_FILE
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", ROTARY_OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert sorted(path.name for path in exported.folder.iterdir()) == [
        GENAI_FILE,
        MODEL_FILE,
        DATA_FILE,
    ]


def test_each_linear_has_exactly_the_planned_q_and_dq(exported: Exported) -> None:
    nodes = {node.name: node for node in exported.graph.node}
    products = exported.products
    static = [name for name, pack in products.items() if pack[0].input_scale is not None]
    counts = Counter(node.op_type for node in exported.graph.node)
    assert counts["QuantizeLinear"] == len(static)
    assert counts["DequantizeLinear"] == len(static) + len(products)
    for name in static:
        quantize, dequantize = nodes[f"{name}/QuantizeInput"], nodes[f"{name}/DequantizeInput"]
        assert dequantize.input[0] == quantize.output[0]
        assert list(quantize.input[1:]) == list(dequantize.input[1:])
        assert nodes[f"{name}/MatMul"].input[0] == dequantize.output[0]
    readers = Counter(name for node in exported.graph.node for name in node.input)
    for name in static:  # the pair serves this product alone
        assert readers[nodes[f"{name}/QuantizeInput"].output[0]] == 1
        assert readers[nodes[f"{name}/DequantizeInput"].output[0]] == 1


def test_weights_are_integer_initializers_in_front_of_their_matmul(exported: Exported) -> None:
    nodes = {node.name: node for node in exported.graph.node}
    stored = initializers(exported)
    for name, pack in exported.products.items():
        linear = pack[0]
        dequantize = nodes[f"{name}/DequantizeWeight"]
        weight = stored[dequantize.input[0]]
        # [K, N]
        assert tuple(weight.dims) == (
            linear.weight.shape[1],
            sum(len(each.weight) for each in pack),
        )
        kind = exported.stored_as(linear)
        assert weight.data_type == onnx.TensorProto.DataType.Value(kind.upper())
        assert nodes[f"{name}/MatMul"].input[1] == dequantize.output[0]
        attributes = {attribute.name: attribute.i for attribute in dequantize.attribute}
        granularity = linear.weight_scheme.granularity
        blocked = isinstance(granularity, PerBlock)
        assert attributes == (
            {"axis": 0, "block_size": granularity.size} if blocked else {"axis": 1}
        )
        assert len(dequantize.input) == (3 if kind == "uint8" else 2)  # no zero point of its own


def test_symmetric_inputs_are_unsigned_around_128_and_scales_positive(exported: Exported) -> None:
    pairs = [
        node
        for node in exported.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    zeros = list(values_of(exported, *{node.input[2] for node in pairs if len(node.input) > 2}))
    assert all(array.dtype == np.uint8 and (array == 128).all() for array in zeros)
    assert bool(zeros) == any(node.op_type == "QuantizeLinear" for node in pairs)
    scales = list(values_of(exported, *{node.input[1] for node in pairs}))
    assert all(bool((scale > 0).all() and np.isfinite(scale).all()) for scale in scales)
    assert {scale.dtype for scale in scales} == {np.dtype(np.float32)}


def test_large_initializers_are_external_and_the_file_itself_is_small(exported: Exported) -> None:
    external = 0
    for tensor in exported.graph.initializer:
        elements = int(np.prod(tensor.dims))
        bits = ir.DataType(tensor.data_type).bitwidth
        if elements * bits / 8 > INLINE_BYTES:
            assert tensor.data_location == onnx.TensorProto.EXTERNAL, tensor.name
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == DATA_FILE  # relative: the folder can be moved
            assert int(entries["length"]) == elements * bits // 8 + (elements * bits % 8 > 0)
            external += 1
    assert external > 5  # the tables and all but the smallest weights
    assert not [
        node
        for node in exported.graph.node
        if any(len(a.t.raw_data) > INLINE_BYTES for a in node.attribute)
    ]


def test_inputs_and_outputs_have_the_documented_names_and_axes(exported: Exported) -> None:
    config = exported.quantized.config
    cache = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    graph = exported.graph
    assert [value.name for value in graph.input] == [
        *FIXED_INPUTS,
        *(f"past_key_values.{name}" for name in cache),
    ]
    assert [value.name for value in graph.output] == [
        "logits",
        *(f"present.{name}" for name in cache),
    ]
    found = {value.name: axes(value) for value in (*graph.input, *graph.output)}
    assert found["input_ids"] == found["position_ids"] == ["batch", "sequence"]
    assert found["attention_mask"] == ["batch", "total"]
    assert found["logits"] == ["batch", "sequence", config["vocab_size"]]
    for name in cache:
        assert (found[f"past_key_values.{name}"][0], found[f"past_key_values.{name}"][2]) == (
            "batch",
            "past",
        )
        assert (found[f"present.{name}"][0], found[f"present.{name}"][2]) == ("batch", "total")
        # heads, head_dim
        assert found[f"present.{name}"][1::2] == found[f"past_key_values.{name}"][1::2]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "r4" in case[2]])
def test_an_online_rotation_is_a_small_matmul_per_factor(
    name: str, export_of: Callable[[str], Exported]
) -> None:
    exported = export_of(name)
    constants = {tensor.name: tuple(tensor.dims) for tensor in exported.graph.initializer}
    nodes = [
        node for node in exported.graph.node if "/Factor" in node.name and node.op_type == "MatMul"
    ]
    for linear in exported.quantized.linears.values():
        if linear.online_rotation is None:
            continue
        rotation = exported.quantized.rotations[linear.online_rotation]
        assert rotation.order is not None
        orders = factor_order(block_order(rotation.order))
        assert orders is not None
        own = [node for node in nodes if node.name.startswith(f"{rotation.name}/")]
        shapes = [
            next(constants[value] for value in node.input if value in constants) for node in own
        ]
        assert shapes == [(order, order) for order in orders]
        if len(orders) > 1:
            assert (rotation.order, rotation.order) not in constants.values()
        signs = [node for node in exported.graph.node if node.name == f"{rotation.name}/Signs"]
        assert len(signs) == (rotation.seed is not None)


def test_the_cases_cover_two_factors_blocks_and_signs(
    export_of: Callable[[str], Exported],
) -> None:
    def rotation(name: str) -> tuple[int | None, int | None]:
        found = export_of(name).quantized.rotations["R4.0"]
        return found.order, found.seed

    order, seed = rotation("llama")
    assert seed is None
    assert order is not None
    assert len(factor_order(order) or ()) == 2
    assert rotation("signs")[1] is not None
    order, _ = rotation("block-diagonal")
    assert order is not None
    assert 1 < block_order(order) < order


def test_the_file_names_no_place_on_this_machine(exported: Exported) -> None:
    data = (exported.folder / MODEL_FILE).read_bytes()
    for place in (
        b"site-packages",
        b".py",
        str(Path.home()).encode() + b"/",
        tempfile.gettempdir().encode() + b"/",
    ):
        assert place not in data
    assert str(Path(__file__).parents[3]).encode() not in data
    assert not any(node.metadata_props or node.doc_string for node in exported.graph.node)


def test_the_same_model_gives_the_same_bytes(llama: Exported, tmp_path: Path) -> None:
    OnnxBackend().write(llama.quantized, tmp_path, WriteOptions("ort"))
    for name in (MODEL_FILE, DATA_FILE):
        assert (tmp_path / name).read_bytes() == (llama.folder / name).read_bytes(), name
