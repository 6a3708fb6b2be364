"""What runtimes make of a node that writes new keys into the buffer of the old ones: the reasons of
the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from backends.onnx import tensorrt_rtx
from backends.onnx.targets import TARGETS
from calib.errors import BackendError

HEADS, SIZE, ROOM, FILLED = 2, 64, 16, 3
Shape = list[int | str]


def model(node: ir.Node, outputs: Sequence[Shape]) -> bytes:
    """A model of one node, the first type that goes in being that of all that comes out."""
    for value, shape in zip(node.outputs, outputs, strict=True):
        value.shape, value.dtype = ir.Shape(shape), node.inputs[0].dtype
    opsets = {"": 24, "com.microsoft": 1}
    graph = ir.Graph(node.inputs, node.outputs, nodes=[node], opset_imports=opsets, name="buffer")
    return ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()


def value(name: str, shape: Shape, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def scatter(room: int | str, dtype: ir.DataType = ir.DataType.FLOAT) -> bytes:
    """TensorScatter of new keys ``[B, H, S, D]`` into a buffer ``[B, H, room, D]`` from row
    ``index`` on.
    """
    buffer: Shape = ["batch", HEADS, room, SIZE]
    inputs = [
        value("past", buffer, dtype),
        value("new", ["batch", HEADS, "sequence", SIZE], dtype),
        value("index", ["batch"], ir.DataType.INT64),
    ]
    return model(
        ir.node("TensorScatter", inputs, {"axis": 2}, outputs=[ir.Value(name="present")]), [buffer]
    )


def attention() -> bytes:
    """One GroupQueryAttention with as many heads of keys as of queries."""
    rows: Shape = ["batch", "sequence", HEADS * SIZE]
    past: Shape = ["batch", HEADS, "past", SIZE]
    present: Shape = ["batch", HEADS, "present", SIZE]
    shapes = {"query": rows, "key": rows, "value": rows, "past_key": past, "past_value": past}
    node = ir.node(
        "GroupQueryAttention",
        [value(name, shape) for name, shape in shapes.items()]
        + [value("last", ["batch"], ir.DataType.INT32), value("total", [1], ir.DataType.INT32)],
        {"num_heads": HEADS, "kv_num_heads": HEADS},
        domain="com.microsoft",
        outputs=[ir.Value(name=name) for name in ("out", "present_key", "present_value")],
    )
    return model(node, [rows, present, present])


def attention_feeds() -> dict[str, np.ndarray]:
    """One more token, where the buffers of one row hold :data:`FILLED` tokens and have room for
    :data:`ROOM`.
    """
    rng = np.random.default_rng(0)
    new = {
        name: rng.normal(size=(1, 1, HEADS * SIZE)).astype(np.float32)
        for name in ("query", "key", "value")
    }
    buffers = {
        name: np.zeros((1, HEADS, ROOM, SIZE), np.float32) for name in ("past_key", "past_value")
    }
    for buffer in buffers.values():
        buffer[:, :, :FILLED] = rng.normal(size=(1, HEADS, FILLED, SIZE))
    return {
        **new,
        **buffers,
        "last": np.array([FILLED], np.int32),
        "total": np.array([FILLED + 1], np.int32),
    }


def session(data: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def test_onnx_runtime_writes_into_a_buffer_of_any_length() -> None:
    assert TARGETS["ort"].shared_buffer is None
    running = session(scatter("room"))
    for room in (ROOM, 2 * ROOM):
        buffer = onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((1, HEADS, room, SIZE), np.float32)
        )
        binding = running.io_binding()
        binding.bind_ortvalue_input("past", buffer)
        binding.bind_ortvalue_output("present", buffer)
        binding.bind_cpu_input("new", np.ones((1, HEADS, 2, SIZE), np.float32))
        binding.bind_cpu_input("index", np.array([FILLED]))
        running.run_with_iobinding(binding)
        found = buffer.numpy()
        assert (found[:, :, FILLED : FILLED + 2] == 1).all()
        assert found.sum() == 2 * HEADS * SIZE


def test_onnx_runtime_keeps_the_room_of_an_attention() -> None:
    outputs = session(attention()).run(None, attention_feeds())
    assert [output.shape[2] for output in outputs[1:]] == [ROOM, ROOM]


@pytest.mark.runtimes
def test_openvino_has_nothing_that_writes_into_a_buffer() -> None:
    """The refusal is about the runtime: forced, one graph does not load, and the other gives a
    grown cache.
    """
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    assert TARGETS["openvino"].shared_buffer is not None
    core = openvino.Core()
    with pytest.raises(
        Exception, match="No conversion rule found for operations: TensorScatter-24"
    ):
        core.read_model(scatter("room"))
    found = core.compile_model(core.read_model(attention()), "CPU")(attention_feeds())
    assert [found[index].shape[2] for index in (1, 2)] == [FILLED + 1, FILLED + 1]


@pytest.mark.runtimes
def test_tensorrt_writes_into_a_buffer_of_a_fixed_length_alone(tmp_path: Path) -> None:
    """The refusal is about the runtime: forced, the graph is not parsed."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert TARGETS["tensorrt"].shared_buffer is not None
    path = tmp_path / "model.onnx"
    axes = {"batch": (1, 1, 1), "sequence": (1, 1, ROOM), "past": (1, ROOM, ROOM)}
    path.write_bytes(scatter(ROOM, ir.DataType.FLOAT16))
    assert tensorrt_rtx.build(path, "8.9", axes)
    path.write_bytes(scatter("past", ir.DataType.FLOAT16))
    with pytest.raises(BackendError, match="must have a static sequence length"):
        tensorrt_rtx.build(path, "8.9", axes)
