"""Files whose checksums fit and whose content does not: one line of error, whatever reads them.
Each of them was a traceback, a hang or worse.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save_file

from backends.onnx import asking, trace_cache
from backends.onnx.contents import contents
from backends.onnx.files import read_proto
from backends.safetensors.file_names import MANIFEST_FILE
from backends.safetensors.manifest import Manifest
from backends.user_cache import read_entry, write_entry
from calib.artifact import Prefix, load_prefix
from calib.artifact.prefix import save_prefix
from calib.capture.datasets import R1Dataset, R2Dataset
from calib.errors import BackendError, CheckpointError, RotationError
from calib.files.reading import reason_of
from calib.files.sealed import DamagedError, read_sealed, seal_of, write_sealed
from calib.layerwise.shards import JOURNAL, ShardStore
from calib.rotations.files import MANIFEST, load_rotations, save_rotations
from calib.rotations.foreign import import_dartquant
from calib.rotations.rotation_set import RotationSet, hadamard_rotation
from exporter.output.listing import LIST_FILE, remove_listed
from exporter.planning.headers import read_folder
from exporter.reporting.describe import SMOOTHING_FILE, load_smoothing
from tests.sealing import edit_sealed


def _one_line(error: pytest.ExceptionInfo[Any]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "values",
    [{"files": None}, {"files": ["a"]}, {"files": {"../outside": "0"}}, {"files": {"a\0b": "0"}}],
)
def test_a_manifest_that_fits_its_seal(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "outside").write_text("")
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "manifest.json"
    path.write_text(json.dumps({**values, "sha256": seal_of(values)}))
    with pytest.raises(DamagedError) as caught:
        read_sealed(path, lambda values: None)
    _one_line(caught)


def test_a_manifest_that_cannot_be_sealed(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for text in ('{"a": NaN, "files": {}}', '{"a": ' + "[" * 900 + "]" * 900 + "}"):
        path.write_text(text)
        with pytest.raises(DamagedError):
            read_sealed(path, lambda values: None)
    write_sealed(path, {"a": 1})
    with pytest.raises(DamagedError, match="KeyError: 'b'"):
        read_sealed(path, lambda values: values["b"])


@pytest.fixture
def rotations(tmp_path: Path) -> Path:
    save_rotations(RotationSet([hadamard_rotation("r1", 8, seed=1)]), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(rotations=5),
        lambda values: values.update(rotations=[5]),
        lambda values: values["rotations"][0].update(name=5),
        lambda values: values["rotations"][0].update(kind=[]),
        lambda values: values["rotations"][0].update(order="8"),
        lambda values: values["rotations"][0].update(order=-8),
        lambda values: values["rotations"][0].update(seed=2.5),
        lambda values: values["rotations"][0].update(online="no"),
        lambda values: values["rotations"][0].update(block=True),
    ],
)
def test_rotations(rotations: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_sealed(rotations / MANIFEST, change)
    with pytest.raises(RotationError) as caught:
        load_rotations(rotations)
    _one_line(caught)


_R2 = "model.layers.{}.self_attn.R2"
STRANGE_MATRICES: dict[str, dict[str, object]] = {
    "integers": {"R1": torch.eye(8, dtype=torch.int32)},
    "complex": {"R1": torch.eye(8, dtype=torch.complex64)},
    "sparse": {"R1": torch.eye(8).to_sparse()},
    "nothing": {"R1": torch.ones(0, 0), _R2.format(0): torch.ones(0, 8, 8)},
    "without data": {"R1": torch.eye(8, device="meta")},
    "one number for 2**40": {"R1": torch.ones(1).expand(2**20, 2**20)},
    "a number of a layer that Python does not read": {_R2.format("9" * 5000): torch.eye(8)},
    "a digit of another script": {_R2.format("\N{ARABIC-INDIC DIGIT ONE}"): torch.eye(8)},
}


@pytest.mark.parametrize("held", STRANGE_MATRICES.values(), ids=STRANGE_MATRICES)
def test_matrices_of_others(tmp_path: Path, held: dict[str, object]) -> None:
    torch.save(held, tmp_path / "r1.pt")
    with pytest.raises(RotationError) as caught:
        import_dartquant(tmp_path / "r1.pt", None, kv_heads=2)
    _one_line(caught)


@pytest.mark.parametrize(
    "held",
    [
        {"values": torch.ones(4, 8)},
        {"values": torch.ones(4, 8), "weights": torch.ones(3)},
        {"values": torch.tensor(1.0), "weights": torch.tensor(1.0)},
        {"values": torch.ones(2, 1, 4, 8), "weights": torch.ones(2, 5)},
    ],
)
def test_samples_of_a_capture(tmp_path: Path, held: dict[str, torch.Tensor]) -> None:
    for name in ("r1.safetensors", "r2.safetensors"):
        save_file(held, tmp_path / name)
    for opened in (lambda: R1Dataset(tmp_path), lambda: R2Dataset(tmp_path, 0)):
        with pytest.raises(CheckpointError) as caught:
            opened()
        _one_line(caught)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(layers=10**30),
        lambda values: values.update(layers="2"),
        lambda values: values.update(tokens=None),
        lambda values: values.update(tokens=[[1]]),
    ],
)
def test_a_prefix(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    keys, cached = ({0: torch.ones(2, 1, 4)} for _ in "kv")
    save_prefix(Prefix((5,), keys, cached), tmp_path)
    edit_sealed(tmp_path / "prefix.json", change)
    with pytest.raises(CheckpointError) as caught:
        load_prefix(tmp_path)
    _one_line(caught)


def _manifest(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "format_version": 1,
        "rotq": "0",
        "target": "tripy",
        "scheme": "int8",
        "dtype": "float32",
        "model_type": "llama",
        "fingerprint": "0",
        "config": {},
        "tensors": {},
        "linears": {},
        "kept": {},
        "cache": None,
        "files": {},
        **changes,
    }
    return values


@pytest.mark.parametrize(
    "values",
    [
        _manifest(dtype="load"),
        _manifest(dtype="no_such_dtype"),
        _manifest(
            tensors={"a": {"kind": "scale", "dtype": "nn", "shape": [1], "file": "b.safetensors"}}
        ),
        _manifest(format_version=[1]),
        _manifest(tensors={str(number): 5 for number in range(2000)}),
    ],
)
def test_the_manifest_of_a_bundle(tmp_path: Path, values: dict[str, Any]) -> None:
    text = json.dumps({**values, "sha256": seal_of(values)})
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(BackendError) as caught:
        Manifest.load(tmp_path)
    assert len(_one_line(caught)) < 1000


def test_the_manifest_of_a_bundle_that_cannot_be_sealed(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(_manifest(config={"x": math.nan})))
    with pytest.raises(BackendError):
        Manifest.load(tmp_path)


def _graph(folder: Path, **external: str) -> Path:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "data", "offset": "0", "length": "16", **external}.items():
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    (folder / "data").write_bytes(bytes(16))
    node = onnx.NodeProto(op_type="Identity", input=["w"], output=["y"])
    graph = onnx.GraphProto(name="g", node=[node], initializer=[tensor])
    path = folder / "model.onnx"
    path.write_bytes(onnx.ModelProto(ir_version=10, graph=graph).SerializeToString())
    return path


@pytest.mark.parametrize("wrong", [{"offset": "x"}, {"offset": "-16"}, {"length": "9" * 5000}])
def test_where_the_data_of_a_graph_lies(tmp_path: Path, wrong: Mapping[str, str]) -> None:
    read_proto(_graph(tmp_path))
    with pytest.raises(BackendError) as caught:
        read_proto(_graph(tmp_path, **wrong))
    _one_line(caught)


def test_a_graph_of_a_dtype_that_onnx_has_not(tmp_path: Path) -> None:
    path = _graph(tmp_path)
    proto = onnx.ModelProto.FromString(path.read_bytes())
    proto.graph.initializer[0].data_type = 99
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(BackendError) as caught:
        contents(path)
    _one_line(caught)


def test_what_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    for name in ("model.onnx", "entry"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**28 + 1)
    with pytest.raises(BackendError, match="larger than"):
        read_proto(tmp_path / "model.onnx")
    assert read_entry(tmp_path / "entry", "it") is None


def test_entries_of_the_cache_that_fit_their_digest(tmp_path: Path) -> None:
    for answer in ({"kernel": 5, "fused": True}, {"kernel": "", "fused": True, "level": "4"}):
        path = tmp_path / "answers.json"
        write_entry(path, json.dumps({"question": answer}).encode(), "it", kept=4)
        assert asking._read(path) == {}
    value = onnx.ValueInfoProto(name="ids")
    value.type.tensor_type.elem_type = onnx.TensorProto.INT64
    value.type.tensor_type.shape.dim.add().dim_param = "AXIS"
    trace = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g", input=[value]))
    path = tmp_path / "it.trace"
    write_entry(path, trace.SerializeToString(), "it", kept=4)
    assert trace_cache._read(path) is not None
    data = trace.SerializeToString().replace(b"AXIS", b"\xff\xfe\xff\xfe")  # no UTF-8
    write_entry(path, data, "it", kept=4)
    assert trace_cache._read(path) is None


@pytest.mark.parametrize("shard", [5, [], {"sha256": "0", "next_inputs": 5}, {"sha256": "0"}])
def test_the_journal_of_a_layer_wise_run(tmp_path: Path, shard: object) -> None:
    (tmp_path / JOURNAL).write_text(json.dumps({"settings": {}, "shards": {"a": shard}}))
    with pytest.raises(CheckpointError) as caught:
        ShardStore(tmp_path, resume=True)
    _one_line(caught)


def test_a_shard_of_a_layer_wise_run_that_lies_elsewhere(tmp_path: Path) -> None:
    content = b"somebody else's"
    (tmp_path / "quantized_model-x.safetensors").write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "next_inputs": {}}
    folder = tmp_path / "walk"
    (folder / "shards" / "quantized_model-..").mkdir(parents=True)
    journal = {"settings": {}, "shards": {"../../../quantized_model-x": entry}}
    (folder / JOURNAL).write_text(json.dumps(journal))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        ShardStore(folder, resume=True)


def test_a_list_of_files_that_leads_elsewhere(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (folder / "link").symlink_to(elsewhere)
    names = ["link/precious", "a\0b", "\ud800", "", "link"]
    text = json.dumps({"format_version": 1, "files": names})
    (folder / LIST_FILE).write_text(text)
    remove_listed(folder)
    assert (elsewhere / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.5]},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [True, 4, 5]},
    ],
)
def test_a_header_whose_numbers_do_not_fit(tmp_path: Path, entry: Mapping[str, object]) -> None:
    header = json.dumps({"a": entry}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_folder(tmp_path, "it")


def test_scales_of_smoothing_that_are_cut_off(tmp_path: Path) -> None:
    assert load_smoothing(tmp_path) == {}
    save_file({"group": torch.ones(4)}, tmp_path / SMOOTHING_FILE)
    path = tmp_path / SMOOTHING_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        load_smoothing(tmp_path)


def test_what_says_little_is_named() -> None:
    assert reason_of(KeyError("layers")) == "KeyError: 'layers'"
    assert reason_of(RecursionError()) == "RecursionError"

    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert reason_of(Unspeakable()) == "Unspeakable"
