"""Bundles as files: what is written, and what is said of one that is not what it was."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.base import WriteOptions
from backends.safetensors.bundle import write_bundle
from backends.safetensors.file_names import INDEX_FILE, MANIFEST_FILE
from backends.safetensors.layout import Entry
from backends.safetensors.read import open_bundle, read_cache, read_linears, read_model
from backends.safetensors.tensor_file import write_tensors
from calib.artifact import QuantizedCache, QuantizedModel
from calib.errors import BackendError
from calib.files.sealed import digest, seal_of
from calib.schemes import KV_SCHEMES
from tests.backends.safetensors.plain import PlainLayout, entry
from tests.hub_cache import is_sound, link_files
from tests.tiny import CONFIGS, quantize_tiny

SHARD = 40_000
"""Bytes that split the tiny model into several shards."""


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    torch.set_num_threads(1)
    return quantize_tiny(CONFIGS["qwen2"](), "int8", ("r1", "r4"))


@pytest.fixture(scope="module")
def written(model: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in several shards. Tests that damage it copy it."""
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(model, PlainLayout(), folder, WriteOptions("plain", max_shard_bytes=SHARD))
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_safetensors_reads_what_was_written_to_the_last_bit(
    model: QuantizedModel, written: Path
) -> None:
    found: dict[str, Tensor] = {}
    for path in shards(written):
        found |= load_file(path)
    expected = {item.key: item.read() for item in PlainLayout().entries(model)}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def test_shards_are_named_and_indexed_as_the_hub_does(written: Path) -> None:
    names = [path.name for path in shards(written)]
    assert len(names) > 2
    assert names == [
        f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))
    ]
    index = json.loads((written / INDEX_FILE).read_text())
    places = {key: path.name for path in shards(written) for key in load_file(path)}
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for path in shards(written) for t in load_file(path).values()
    )
    for path in shards(written):
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= SHARD or len(tensors) == 1
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_one_shard_has_an_index_too(model: QuantizedModel, tmp_path: Path) -> None:
    """Without one, vLLM loads every safetensors file of the folder, rotations included."""
    write_bundle(model, PlainLayout(), tmp_path, WriteOptions("plain"))
    assert set(json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"].values()) == {
        "model.safetensors"
    }


def test_the_folder_holds_what_the_manifest_lists(written: Path) -> None:
    manifest = open_bundle(written, verify=True).manifest
    assert {path.name for path in written.iterdir()} == {*manifest.files, MANIFEST_FILE}
    for name, file in manifest.files.items():
        assert file.sha256 == digest(written / name)
        assert file.bytes == (written / name).stat().st_size


def test_the_same_model_gives_the_same_bytes(
    model: QuantizedModel, written: Path, tmp_path: Path
) -> None:
    write_bundle(model, PlainLayout(), tmp_path, WriteOptions("plain", max_shard_bytes=SHARD))
    assert {path.name: digest(path) for path in tmp_path.iterdir()} == {
        path.name: digest(path) for path in written.iterdir()
    }


def test_progress_counts_every_tensor(model: QuantizedModel, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    options = WriteOptions("plain", progress=lambda *call: calls.append(call))
    write_bundle(model, PlainLayout(), tmp_path, options)
    total = len(list(PlainLayout().entries(model)))
    assert calls == [("write", done, total) for done in range(1, total + 1)]


def test_the_model_is_read_back_to_the_last_bit(model: QuantizedModel, written: Path) -> None:
    found = read_model(open_bundle(written), PlainLayout())
    assert list(found.linears) == list(model.linears)
    for name, linear in model.linears.items():
        assert found.linears[name].description() == linear.description()
        tensors = found.linears[name].tensors()
        assert tensors.keys() == linear.tensors().keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in linear.tensors().items())
    assert found.floats.keys() == model.floats.keys()
    assert all(torch.equal(found.floats[key], tensor) for key, tensor in model.floats.items())
    assert found.config == json.loads(json.dumps(model.config))
    assert (found.scheme, found.dtype) == (model.scheme, model.dtype)
    assert (found.kept, list(found.rotations)) == (model.kept, list(model.rotations))
    assert found.provenance.fingerprint == model.provenance.fingerprint
    assert read_cache(open_bundle(written), PlainLayout()) is None


def test_tensors_are_aligned_to_their_own_size(tmp_path: Path) -> None:
    """Readers view the mapped bytes as the dtype; an odd number of bytes before a float would make
    that fail.
    """
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.ones(2, dtype=torch.float64),
        "c": torch.tensor(2.0),
    }
    tensors |= {
        "d": torch.zeros(0, 4),
        "e": torch.ones(1).to(torch.float8_e4m3fn),
        "f": torch.ones(1).bfloat16(),
    }
    path = tmp_path / "x.safetensors"
    count: list[None] = []
    found = write_tensors(
        path, [entry(k, "other", t) for k, t in tensors.items()], lambda: count.append(None)
    )
    assert found == digest(path)
    assert len(count) == len(tensors)
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert length % 8 == 0
    table = json.loads(header[8 : 8 + length])
    for key, tensor in tensors.items():
        assert table[key]["data_offsets"][0] % tensor.dtype.itemsize == 0
        assert load_file(path)[key].equal(tensor)
        assert load_file(path)[key].dtype == tensor.dtype


def test_a_tensor_that_is_not_what_was_announced_is_a_defect_of_the_layout(tmp_path: Path) -> None:
    wrong = Entry("a", "other", torch.float32, (2,), lambda: torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"'a' was announced as torch\.float32 \[2\] and is torch\.float32 \[3\]"
    ):
        write_tensors(tmp_path / "x.safetensors", [wrong], lambda: None)


def test_a_key_given_twice_is_a_defect_of_the_layout(model: QuantizedModel, tmp_path: Path) -> None:
    class Doubled(PlainLayout):
        def entries(self, model: QuantizedModel) -> Any:
            yield from (entry("a", "other", torch.zeros(1)) for _ in range(2))

    with pytest.raises(ValueError, match="two tensors for the key 'a'"):
        write_bundle(model, Doubled(), tmp_path, WriteOptions("plain"))
    assert not list(tmp_path.iterdir())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_manifest(
    folder: Path, edit: Callable[[dict[str, Any]], object], *, sealed: bool = True
) -> None:
    """Change the manifest, and by default its checksum with it, as somebody who means it would."""
    path = folder / MANIFEST_FILE
    values = json.loads(path.read_text())
    checksum = values.pop("sha256")
    edit(values)
    values["sha256"] = seal_of(values) if sealed else checksum
    path.write_text(json.dumps(values))


def rewrite_shard(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a shard and the size that the manifest knows of it, so that only its tensors can give
    it away.
    """
    path = shards(folder)[0]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    size = path.stat().st_size
    edit_manifest(folder, lambda values: values["files"][path.name].update(bytes=size))


def rewrite_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the index, and what the manifest knows of it, as somebody who means it would."""
    path = folder / INDEX_FILE
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    now = {"sha256": digest(path), "bytes": path.stat().st_size}
    edit_manifest(folder, lambda values: values["files"].update({INDEX_FILE: now}))


def lead_outside(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(shards(folder)[0].read_bytes())
    key = min(load_file(outside))
    rewrite_index(folder, lambda index: index["weight_map"].update({key: "../outside.safetensors"}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda f: truncate(shards(f)[1]),
        r"00002-of-.* has \d+ bytes instead",
    ),
    "no-shard": (lambda f: shards(f)[0].unlink(), r"model-00001-of-.*\.safetensors is missing"),
    "no-index": (lambda f: (f / INDEX_FILE).unlink(), rf"{INDEX_FILE} is missing"),
    "no-manifest": (lambda f: (f / MANIFEST_FILE).unlink(), f"holds no {MANIFEST_FILE}"),
    "flipped-weight": (lambda f: flip(shards(f)[1], -1), "00002-of-.* was changed"),
    "flipped-header": (lambda f: flip(shards(f)[1], 0), "00002-of-"),
    "flipped-text": (lambda f: flip(f / "plain.txt", 0), r"plain\.txt was changed"),
    "flipped-manifest": (lambda f: flip(f / MANIFEST_FILE, 300), f"{MANIFEST_FILE}' is damaged"),
    "short-manifest": (
        lambda f: (f / MANIFEST_FILE).write_text("{"),
        f"{MANIFEST_FILE}' is damaged",
    ),
    "edited-manifest": (
        lambda f: edit_manifest(
            f, lambda values: values["config"].update(rms_norm_eps=1.0), sealed=False
        ),
        "checksum does not fit",
    ),
    "newer": (
        lambda f: edit_manifest(f, lambda values: values.update(format_version=99)),
        "has format version 99; this rotq reads version 1",
    ),
    "unknown-fields": (
        lambda f: edit_manifest(
            f, lambda values: (values.pop("target"), values.update(colour="red"))
        ),
        "target: Field required; colour: Extra inputs",
    ),
    "escaping": (
        lambda f: (
            (f.parent / "x").write_text("")
            or edit_manifest(
                f, lambda values: values["files"].update({"../x": {"sha256": "", "bytes": 0}})
            )
        ),
        r"\.\./x is missing",
    ),
    "index-outside": (
        lead_outside,
        r"is in '\.\./outside\.safetensors', by its manifest in 'model-",
    ),
    "index-lacks-a-key": (
        lambda f: rewrite_index(f, lambda index: index["weight_map"].popitem()),
        "is in 'None', by its manifest in 'model-",
    ),
    "index-has-a-stranger": (
        lambda f: rewrite_index(f, lambda index: index["weight_map"].update(x="model.bin")),
        r"'x' is in 'model\.bin', by its manifest in 'None'",
    ),
    "index-is-no-index": (
        lambda f: rewrite_index(f, lambda index: index.clear()),
        f"{INDEX_FILE} cannot be read",
    ),
    "unlisted": (
        lambda f: edit_manifest(f, lambda values: values["files"].pop(shards(f)[0].name)),
        r"model-00001-of-.* is not listed with a checksum",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(copied: Path, damage: str) -> None:
    act, message = DAMAGE[damage]
    open_bundle(copied, verify=True)  # it opens before
    act(copied)
    with pytest.raises(BackendError, match=message) as caught:
        open_bundle(copied, verify=True)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_a_flipped_byte_is_found_only_where_checksums_are_asked_for(copied: Path) -> None:
    flip(shards(copied)[1], -1)
    open_bundle(copied)  # inspecting a bundle of a hundred gigabytes shall not read all of it


def test_all_that_is_wrong_with_the_tensors_is_in_one_error(copied: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        keys = sorted(tensors)
        del tensors[keys[0]]
        tensors["stranger"] = torch.zeros(1)
        tensors[keys[1]] = tensors[keys[1]].double()
        tensors[keys[2]] = tensors[keys[2]].flatten()[:-1].contiguous()

    keys = sorted(load_file(shards(copied)[0]))[:3]
    rewrite_shard(copied, edit)
    with pytest.raises(BackendError, match="does not hold what its manifest says") as caught:
        open_bundle(copied)
    for text in (
        f"missing: {keys[0]}",
        "unexpected: stranger",
        "float64 instead of",
        keys[1],
        keys[2],
        " [",
        "instead",
    ):
        assert text in caught.value.message


def test_links_as_in_the_cache_of_the_hub_are_read(
    model: QuantizedModel, copied: Path, tmp_path: Path
) -> None:
    link_files(copied, tmp_path / "blobs")
    found = read_model(open_bundle(copied, verify=True), PlainLayout())
    assert list(found.linears) == list(model.linears)
    assert is_sound(tmp_path / "blobs")


def test_a_bundle_for_another_target_is_refused(written: Path) -> None:
    with pytest.raises(BackendError, match="written for target 'plain', not for 'tripy'"):
        open_bundle(written, target="tripy")


def expected_of(folder: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    tensors = open_bundle(folder).manifest.tensors
    return {key: (entry.torch_dtype, entry.shape) for key, entry in tensors.items()}


def test_a_model_that_fits_is_not_complained_about(written: Path) -> None:
    open_bundle(written).check(expected_of(written), "this model")


def test_a_model_that_does_not_fit_hears_everything_at_once(written: Path) -> None:
    expected: dict[str, Any] = expected_of(written)
    norm = "model.norm.weight"
    expected[norm] = (torch.int8, [3])
    expected["model.embed_tokens.weight"] = (torch.float32, [97, 48, 1])
    for layer in range(2):
        expected[f"model.layers.{layer}.extra"] = (torch.float32, [])
        del expected[f"model.layers.{layer}.self_attn.q_proj.bias"]
    with pytest.raises(BackendError) as caught:
        open_bundle(written).check(expected, "the model")
    assert (
        caught.value.message
        == f"the bundle '{written}' of a 'qwen2' model for target 'plain' does not fit the model:"
        " missing: model.layers.{0-1}.extra; unexpected:"
        " model.layers.{0-1}.self_attn.q_proj.bias; dtype float32 instead of int8 and shape"
        " [48] instead of [3]: model.norm.weight; rank 2 [97, 48] instead of 3 [97, 48, 1]:"
        " model.embed_tokens.weight"
    )


class Broken(PlainLayout):
    """Reads other tensors than it wrote."""

    def linears(self, tensors: Mapping[str, Tensor], described: Any, config: Any) -> Any:
        return {name: tensors[f"{name}.nothing"] for name in described}


def test_a_layout_that_misses_a_tensor_names_the_bundle(written: Path) -> None:
    with pytest.raises(
        BackendError, match=r"does not hold what its manifest says: .*q_proj\.nothing"
    ):
        read_linears(open_bundle(written), Broken())


class SlowDigest:
    """A checksum that takes longer than making the next tensor does."""

    def __init__(self, data: bytes) -> None:
        pass

    def update(self, data: memoryview) -> None:
        time.sleep(0.005)

    def hexdigest(self) -> str:
        return ""


@pytest.mark.parametrize(("budget", "allowed"), [(7999, 1), (8000, 2), (10**6, 2)])
def test_memory_holds_one_tensor_or_two_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, allowed: int
) -> None:
    """Counted where it can be counted exactly: how many tensors are alive when another one is
    made.
    """
    monkeypatch.setattr("backends.safetensors.tensor_file._HELD_BYTES", budget)
    monkeypatch.setattr(
        "backends.safetensors.tensor_file.hashlib", SimpleNamespace(sha256=SlowDigest)
    )
    alive: set[int] = set()
    most = 0

    def read(index: int) -> Callable[[], Tensor]:
        def make() -> Tensor:
            nonlocal most
            most = max(most, len(alive) + 1)
            memory = np.full(1000, index, dtype=np.float32)  # lives as long as any view of it does
            alive.add(index)
            weakref.finalize(memory, alive.discard, index)
            return torch.from_numpy(memory)

        return make

    entries = [Entry(f"t{i}", "other", torch.float32, (1000,), read(i)) for i in range(20)]
    write_tensors(tmp_path / "x.safetensors", entries, lambda: None)
    assert most == allowed
    assert math.isclose((tmp_path / "x.safetensors").stat().st_size, 80_000, rel_tol=0.1)


def test_a_cache_and_no_linears_are_read_back(model: QuantizedModel, tmp_path: Path) -> None:
    scales = {layer: torch.tensor(0.5 + layer) for layer in range(2)}
    cached = dataclasses.replace(
        model,
        linears={},
        cache=QuantizedCache(KV_SCHEMES["int8"], scales, {k: v + 1 for k, v in scales.items()}),
    )
    write_bundle(cached, PlainLayout(), tmp_path, WriteOptions("plain"))
    found = read_model(open_bundle(tmp_path, verify=True), PlainLayout())
    assert found.linears == {}
    assert found.cache is not None
    assert found.cache.scheme == KV_SCHEMES["int8"]
    assert found.cache.key_scale == scales
    assert found.cache.value_scale == {k: v + 1 for k, v in scales.items()}
