"""Damaged folders: one clear error that names the file, before any runtime sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import DATA_FILE, MODEL_FILE
from backends.onnx.files import read_proto
from backends.testing.damage import openers
from calib.errors import BackendError
from tests.backends.onnx.conftest import Exported
from tests.hub_cache import is_sound, link_files


def edit_places(path: Path, edit: Callable[[onnx.StringStringEntryProto], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            edit(entry)
    path.write_bytes(model.SerializeToString())


def refused(folder: Path, match: str) -> BackendError:
    with pytest.raises(BackendError, match=match) as caught:
        read_proto(folder / MODEL_FILE)
    assert "\n" not in caught.value.message
    assert MODEL_FILE in caught.value.message
    assert caught.value.hint
    return caught.value


def test_a_whole_folder_opens(copied: Path) -> None:
    assert read_proto(copied / MODEL_FILE).graph.node


@pytest.mark.parametrize("shard", [None, 40_000])
def test_links_as_in_the_cache_of_the_hub_are_read(
    llama: Exported, tmp_path: Path, shard: int | None
) -> None:
    folder, backend = tmp_path / "snapshots" / "1", OnnxBackend()
    folder.mkdir(parents=True)
    backend.write(llama.quantized, folder, WriteOptions("ort", max_shard_bytes=shard))
    link_files(folder, tmp_path / "blobs")
    found = backend.read_linears(folder, "ort")
    for name, linear in llama.quantized.linears.items():
        assert torch.equal(found[name].weight, linear.weight)
    for open_folder in openers(backend, folder, "ort").values():
        open_folder()
    assert is_sound(tmp_path / "blobs")


def test_data_that_leads_to_several_folders_is_one_line(llama: Exported, tmp_path: Path) -> None:
    OnnxBackend().write(llama.quantized, tmp_path, WriteOptions("ort", max_shard_bytes=40_000))
    (tmp_path / "elsewhere").mkdir()
    data = min(tmp_path.glob("*.data"))
    data.rename(tmp_path / "elsewhere" / data.name)
    data.symlink_to(tmp_path / "elsewhere" / data.name)
    with pytest.raises(BackendError, match="leads to several folders"):
        OnnxBackend().load_probed(tmp_path, "ort")


def test_missing_data_is_named(copied: Path) -> None:
    (copied / DATA_FILE).unlink()
    refused(copied, rf"'{DATA_FILE}', which holds its weights, is missing")


def test_a_missing_shard_is_named(llama: Exported, tmp_path: Path) -> None:
    OnnxBackend().write(llama.quantized, tmp_path, WriteOptions("ort", max_shard_bytes=40_000))
    gone = sorted(tmp_path.glob("*.data"))[1]
    gone.unlink()
    refused(tmp_path, gone.name)


def test_one_missing_byte_is_noticed(copied: Path) -> None:
    data = copied / DATA_FILE
    data.write_bytes(data.read_bytes()[:-1])
    refused(copied, rf"'{DATA_FILE}' is truncated")


@pytest.mark.parametrize(
    "location", ["../model.onnx.data", "/etc/hostname", "sub/model.onnx.data", ""]
)
def test_data_outside_the_folder_is_not_read(copied: Path, location: str) -> None:
    def elsewhere(entry: onnx.StringStringEntryProto) -> None:
        if entry.key == "location":
            entry.value = location

    edit_places(copied / MODEL_FILE, elsewhere)
    refused(copied, "not a file beside it")


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95pickle", b"this is not a graph" * 50])
def test_what_is_no_graph_is_refused(copied: Path, content: bytes) -> None:
    (copied / MODEL_FILE).write_bytes(content)
    refused(copied, "cannot be loaded")


def test_a_missing_graph_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "No such file")
