"""Writing graphs and weights: in one file or several, one tensor in memory at a time, the same
bytes every time.
"""

from __future__ import annotations

import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import DATA_FILE, MODEL_FILE
from backends.onnx.files import data_ranges
from backends.onnx.save import save
from calib.process.progress import silent
from tests.backends.onnx.conftest import Exported
from tests.tiny import token_rows

PAGE = 4096
SHARD = 40_000
ROWS = 64


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
        for tensor in graph.initializer
    }


@pytest.fixture(scope="module")
def sharded(export_of: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, Path]:
    llama: Exported = export_of("llama")  # type: ignore[operator]
    folder = tmp_path_factory.mktemp("sharded")
    OnnxBackend().write(llama.quantized, folder, WriteOptions("ort", max_shard_bytes=SHARD))
    return llama, folder


def test_shards_are_numbered_and_as_large_as_allowed(sharded: tuple[Exported, Path]) -> None:
    _, folder = sharded
    shards = sorted(folder.glob("*.data"))
    assert len(shards) > 2
    names = [
        f"model-{index:05d}-of-{len(shards):05d}.onnx.data" for index in range(1, len(shards) + 1)
    ]
    assert [path.name for path in shards] == names
    held: dict[str, list[int]] = {}
    for _, place in data_ranges(onnx.load(folder / MODEL_FILE, load_external_data=False)):
        held.setdefault(place.location, []).append(place.length)
    assert sorted(held) == names
    for path in shards:
        assert path.stat().st_size <= SHARD or len(held[path.name]) == 1


def test_shards_hold_what_one_file_holds(sharded: tuple[Exported, Path]) -> None:
    llama, folder = sharded
    whole, parts = arrays_of(llama.folder), arrays_of(folder)
    assert list(whole) == list(parts)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_shards_compute_the_same_logits(sharded: tuple[Exported, Path]) -> None:
    llama, folder = sharded
    ids = token_rows((9,))[0][None]
    inputs = (ids, torch.ones_like(ids), torch.arange(9)[None])
    runtime = OnnxBackend().load(folder, "ort", exact=True)
    assert torch.equal(runtime.forward(*inputs)[0], llama.runtime().forward(*inputs)[0])


@pytest.mark.runtimes
def test_shards_load_in_openvino(sharded: tuple[Exported, Path]) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    llama, folder = sharded
    ids = token_rows((9,))[0][None]
    inputs = (ids, torch.ones_like(ids), torch.arange(9)[None])
    found, one_file = (
        OnnxBackend().load(path, "openvino", exact=True) for path in (folder, llama.folder)
    )
    assert torch.equal(found.forward(*inputs)[0], one_file.forward(*inputs)[0])


def test_a_limit_that_is_not_reached_leaves_one_file(llama: Exported, tmp_path: Path) -> None:
    OnnxBackend().write(llama.quantized, tmp_path, WriteOptions("ort", max_shard_bytes=10**9))
    assert files_of(tmp_path) == files_of(llama.folder)


def test_the_same_model_gives_the_same_shards(
    sharded: tuple[Exported, Path], tmp_path: Path
) -> None:
    llama, folder = sharded
    OnnxBackend().write(llama.quantized, tmp_path, WriteOptions("ort", max_shard_bytes=SHARD))
    assert files_of(tmp_path) == files_of(folder)


def test_large_weights_begin_at_a_page(llama: Exported) -> None:
    model = onnx.load(llama.folder / MODEL_FILE, load_external_data=False)
    places = [place for _, place in data_ranges(model)]
    assert {place.location for place in places} == {DATA_FILE}
    assert all(place.offset % PAGE == 0 for place in places if place.length > PAGE)
    ends = sorted((place.offset, place.offset + place.length) for place in places)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """However many there are: what a tensor was read into is gone before the next one but one is
    read.
    """
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def read(index: int) -> ir.Tensor:
        nonlocal most
        array = np.full((ROWS, ROWS), index, dtype=np.float32)
        alive.append(weakref.ref(array))
        most = max(most, sum(reference() is not None for reference in alive))
        return ir.tensor(array)

    graph, count = _graph_of(read), 40
    done: list[tuple[str, int, int]] = []
    save(
        graph,
        tmp_path / MODEL_FILE,
        max_shard_bytes=None,
        progress=lambda stage, n, of: done.append((stage, n, of)),
    )
    assert len(alive) == count
    assert most <= 2
    assert done == [("write", index + 1, count) for index in range(count)]
    found = arrays_of(tmp_path)
    assert [int(found[f"w{index}"][0, 0]) for index in range(count)] == list(range(count))


def _graph_of(read: object, count: int = 40) -> ir.Model:
    """x times each of ``count`` matrices in turn, which are read when they are asked for."""
    shape, kind = ir.Shape([ROWS, ROWS]), ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=shape, type=kind)
    initializers, nodes, value = [], [], x
    for index in range(count):
        held = ir.LazyTensor(
            lambda index=index: read(index),  # type: ignore[misc,operator]
            dtype=ir.DataType.FLOAT,
            shape=shape,
            name=f"w{index}",
        )
        initializers.append(ir.Value(name=f"w{index}", shape=shape, type=kind, const_value=held))
        nodes.append(ir.node("MatMul", [value, initializers[-1]], name=f"n{index}"))
        value = nodes[-1].outputs[0]
        value.name, value.shape, value.type = f"y{index}", shape, kind
    graph = ir.Graph(
        [x], [value], nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def test_a_limit_of_nothing_is_refused_by_the_writer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size_bytes"):
        save(
            _graph_of(lambda index: ir.tensor(np.zeros((ROWS, ROWS), np.float32))),
            tmp_path / MODEL_FILE,
            max_shard_bytes=0,
            progress=silent,
        )
