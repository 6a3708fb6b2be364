"""Traces are kept by what they depend on, found again, and made again where they are damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

import backends.onnx.trace_cache as module
from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.trace import TraceRequest, trace
from backends.onnx.trace_cache import cached_trace, key_of
from backends.user_cache import cache_folder
from calib.network.skeleton import portable_config
from calib.process.progress import silent
from calib.rotations.rotation_set import RotationSet, hadamard_rotation
from tests.tiny import CONFIGS, make_tiny, quantize_tiny

Count = Callable[[], int]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROTQ_CACHE", str(tmp_path))
    return tmp_path / "traces"


@pytest.fixture(scope="module")
def made() -> ir.Model:
    """One trace, which takes seconds."""
    return trace(request())


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, made: ir.Model) -> Count:
    """How often something was traced; what comes out is always the same."""
    calls: list[TraceRequest] = []

    def counted(request: TraceRequest) -> ir.Model:
        calls.append(request)
        return ir.from_proto(ir.to_proto(made))

    monkeypatch.setattr(module, "trace", counted)
    return lambda: len(calls)


def request(name: str = "opt-noaffine", **options: object) -> TraceRequest:
    fields = {"dtype": torch.float32, "opset": 21} | options
    return TraceRequest(portable_config(CONFIGS[name]()), **fields)  # type: ignore[arg-type]


def text(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def test_another_scheme_does_not_trace_again(folder: Path, traced: Count, tmp_path: Path) -> None:
    for scheme in ("int8-weight-only", "int4-weight-only", "int8-weight-only"):
        out = tmp_path / f"{scheme}{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        OnnxBackend().write(
            quantize_tiny(CONFIGS["opt-noaffine"](), scheme), out, WriteOptions("ort")
        )
    assert traced() == 1
    first, again = sorted(tmp_path.glob("int8*"))
    assert (first / "model.onnx").read_bytes() == (again / "model.onnx").read_bytes()
    assert [path.suffix for path in folder.iterdir()] == [".trace"]


def test_what_was_traced_now_and_what_was_kept_are_the_same(folder: Path, traced: Count) -> None:
    first, second = (text(cached_trace(request(), silent)) for _ in range(2))
    assert first == second
    assert traced() == 1


def test_changing_the_graph_changes_nothing_in_the_cache(folder: Path, traced: Count) -> None:
    model = cached_trace(request(), silent)
    before = text(model)
    model.graph.name = "changed"
    assert text(cached_trace(request(), silent)) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: b"",
        lambda data: b"not a trace",
    ],
    ids=["short", "flipped", "empty", "other"],
)
def test_a_damaged_entry_is_made_again(
    folder: Path, traced: Count, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    before = text(cached_trace(request(), silent))
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert text(cached_trace(request(), silent)) == before
    assert "damaged" in caplog.text
    assert traced() == 2
    assert entry.read_bytes() == whole


def test_the_key_holds_all_that_a_trace_depends_on_and_nothing_else() -> None:
    tiny = make_tiny(CONFIGS["llama"]())
    sizes = tiny.wiring.sizes
    rotations = [
        RotationSet(
            hadamard_rotation("r3", sizes.head_dim, layer=layer, seed=seed)
            for layer in range(sizes.layers)
        )
        for seed in (1, 2)
    ]
    requests = [
        request("llama"),
        request("llama", dtype=torch.float16),
        request("llama", opset=23),
        request("llama", last_logits=True),
        request("llama", r3=rotations[0]),
        request("llama", r3=rotations[1]),
        request("qwen2"),
    ]
    keys = [key_of(entry) for entry in requests]
    assert len(set(keys)) == len(keys)
    assert key_of(request("llama")) == keys[0]


def test_a_tied_head_is_traced_as_one_that_is_not(made: ir.Model) -> None:
    tied = request()
    untied = replace(tied, config={**tied.config, "tie_word_embeddings": False})
    assert tied.config["tie_word_embeddings"]
    assert key_of(untied) == key_of(tied)
    assert text(ir.from_proto(ir.to_proto(trace(untied)))) == text(made)


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: Count, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ROTQ_CACHE", str(tmp_path / "file"))
    assert len(list(cached_trace(request(), silent).graph)) > 10
    assert "cannot be kept" in caplog.text


def test_a_write_that_fails_leaves_nothing_behind(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    (folder / "entry.trace").mkdir()  # a file cannot take its place
    module._write(folder / "entry.trace", b"data")
    assert "cannot be kept" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["entry.trace"]


def test_entries_that_another_process_removed_are_none_of_its_business(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    (folder / "gone.trace").symlink_to(folder / "nowhere")
    module._write(folder / "entry.trace", b"data")
    assert (folder / "entry.trace").is_file()
    assert not caplog.text


def test_the_oldest_entries_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    monkeypatch.setattr(module, "_KEPT", 2)
    for index in range(4):
        module._write(folder / f"{index}.trace", b"data")
        os.utime(folder / f"{index}.trace", (index, index))
    assert sorted(path.stem for path in folder.iterdir()) == ["2", "3"]


def test_the_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ROTQ_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("ROTQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rotq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "rotq"
