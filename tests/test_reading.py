"""Whatever a file holds, reading it ends with a value or with one line."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from backends.safetensors.compressed_tensors.runner import load as load_for_transformers
from backends.safetensors.file_names import INDEX_FILE
from backends.safetensors.read import _check_index
from calib.errors import (
    BackendError,
    CheckpointError,
    DataError,
    OutputError,
    RotationError,
    RotqError,
)
from calib.files.reading import LARGEST, parse_json, read_json, reason_of
from calib.network.checkpoint import load_config, open_checkpoint
from calib.rotations.files import load_rotations
from calib.rotations.foreign import import_dartquant
from exporter.commands.verify import _read_config
from exporter.output import HOLDER_FILE, LIST_FILE, locked, unlisted
from exporter.planning.headers import read_headers

STRANGE = {
    "nested": "[" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "digits": '{"a": ' + "9" * 10_000 + "}",
    "not JSON": "{",
    "empty": "",
    "no object": "[1]",
    "null": "null",
    "not UTF-8": "\udcff",
}


def _write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_json_of_somebody_else(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_json(_write(tmp_path / "file.json", text))


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(ValueError, match="larger than"):
        read_json(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="no regular file"):
        read_json(tmp_path / "config.json")
    for read in (load_config, open_checkpoint, lambda folder: read_headers(str(folder))):
        with pytest.raises(CheckpointError, match="no regular file"):
            read(tmp_path)
    os.mkfifo(tmp_path / "rotations.json")
    with pytest.raises(RotationError, match="no regular file"):
        load_rotations(tmp_path)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing.json")


def test_json_may_hold_what_it_likes() -> None:
    assert parse_json(b'{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_config_json_of_a_model(tmp_path: Path, text: str) -> None:
    _write(tmp_path / "config.json", text)
    _write(tmp_path / "model.safetensors", "")
    for read in (load_config, lambda folder: read_headers(str(folder))):
        with pytest.raises(RotqError, match=r"config\.json") as caught:
            read(tmp_path)
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_the_index_of_a_model(tmp_path: Path, text: str) -> None:
    _write(tmp_path / "config.json", "{}")
    _write(tmp_path / "model.safetensors.index.json", text)
    for read in (open_checkpoint, lambda folder: read_headers(str(folder))):
        with pytest.raises(CheckpointError, match=r"index\.json"):
            read(tmp_path)


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_config_json_of_an_export(tmp_path: Path, text: str) -> None:
    _write(tmp_path / "config.json", text)
    run = partial(load_for_transformers, exact=False, stands_in=False, not_run_in="")
    for read in (_read_config, run):
        with pytest.raises(RotqError, match=r"config\.json") as caught:
            read(tmp_path)
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_the_index_of_a_bundle(tmp_path: Path, text: str) -> None:
    _write(tmp_path / INDEX_FILE, text)
    with pytest.raises(BackendError, match=r"index\.json cannot be read") as caught:
        _check_index(tmp_path, SimpleNamespace(tensors={}))  # type: ignore[arg-type]
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_what_an_output_says_of_itself(tmp_path: Path, text: str) -> None:
    _write(tmp_path / LIST_FILE, text)
    assert unlisted(tmp_path) is None
    with locked(tmp_path, "the folder", "wait"):
        _write(tmp_path / HOLDER_FILE, text)
        with (
            pytest.raises(OutputError, match="in use by another process"),
            locked(tmp_path, "the folder", "wait"),
        ):
            pytest.fail("the block must not run")


def test_layers_that_would_fill_the_memory(tmp_path: Path) -> None:
    _write(tmp_path / "config.json", '{"model_type": "qwen2", "num_hidden_layers": 1000000000000}')
    with pytest.raises(CheckpointError, match="1000000000000 layers"):
        load_config(tmp_path)


def test_an_empty_file_of_rotations(tmp_path: Path) -> None:
    _write(tmp_path / "r1.pt", "")
    with pytest.raises(RotationError, match="cannot be read"):
        import_dartquant(tmp_path / "r1.pt", tmp_path / "r2.pt", kv_heads=2)


def test_what_an_exception_says_is_one_short_line() -> None:
    assert reason_of(ValueError("two\n  lines")) == "two lines"
    assert reason_of(EOFError()) == "EOFError"
    assert len(reason_of(DataError("x" * 10_000))) < 310
