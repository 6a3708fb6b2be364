"""The artifact on disk: nothing is lost, nothing is read early, and every damage is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.artifact import QuantizedModel, load_artifact, save_artifact
from calib.artifact.files import FORMAT_VERSION, MANIFEST
from calib.errors import CheckpointError, RotationError
from calib.quantizing.plan import customised
from calib.schemes import Scheme, scheme_named
from tests.sealing import edit_sealed, flipped
from tests.tiny import CONFIGS, quantize_tiny

DOWN = "model.layers.0.mlp.down_proj"
WEIGHTS = "quantized_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    """With biases, folded matrices, an online Hadamard per layer, and a side file."""
    quantized = quantize_tiny(CONFIGS["qwen2"](), "int8", ["r1", "r2", "r4"])
    config = tmp_path_factory.mktemp("source") / "config.json"
    config.write_text('{"model_type": "qwen2"}')
    return dataclasses.replace(quantized, files={"config.json": config})


@pytest.fixture
def saved(model: QuantizedModel, tmp_path: Path) -> Path:
    save_artifact(model, tmp_path)
    return tmp_path


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)


def walk(value: Any) -> Iterator[Any]:
    """A value and everything inside it."""
    yield value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "values") and not isinstance(value, Tensor):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from walk(part)


def test_a_round_trip_keeps_every_bit(model: QuantizedModel, saved: Path) -> None:
    loaded = load_artifact(saved)
    assert list(loaded.linears) == list(model.linears)
    for name, linear in model.linears.items():
        for field in dataclasses.fields(linear):
            before, after = getattr(linear, field.name), getattr(loaded.linears[name], field.name)
            assert equal(before, after) if isinstance(before, Tensor) else before == after, (
                name,
                field.name,
            )
    assert loaded.floats.keys() == model.floats.keys()
    assert all(equal(loaded.floats[key], tensor) for key, tensor in model.floats.items())
    assert loaded.config == json.loads(json.dumps(model.config))
    assert (loaded.scheme, loaded.dtype, loaded.kept) == (model.scheme, model.dtype, model.kept)
    assert loaded.provenance == model.provenance
    assert {name: path.read_text() for name, path in loaded.files.items()} == {
        name: path.read_text() for name, path in model.files.items()
    }


def test_rotations_come_back_exactly(model: QuantizedModel, saved: Path) -> None:
    loaded = load_artifact(saved).rotations
    assert list(loaded) == list(model.rotations)
    assert loaded.kinds() == ("r1", "r2", "r4")
    for name, rotation in model.rotations.items():
        assert torch.equal(loaded[name].dense(), rotation.dense())
        assert (loaded[name].order, loaded[name].seed) == (rotation.order, rotation.seed)
        assert (loaded[name].online, loaded[name].origin) == (rotation.online, rotation.origin)


def test_saving_a_loaded_model_writes_the_same_bytes(
    saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = tmp_path_factory.mktemp("again")
    save_artifact(load_artifact(saved), again)
    assert {path.name for path in again.iterdir()} == {path.name for path in saved.iterdir()}
    for path in saved.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_int4_and_float8_survive(tmp_path: Path) -> None:
    for scheme, dtype in (("int4-weight-only", torch.int8), ("float8", torch.float8_e4m3fn)):
        quantized = quantize_tiny(CONFIGS["llama"](), scheme)
        folder = tmp_path / scheme
        folder.mkdir()
        save_artifact(quantized, folder)
        for name, linear in load_artifact(folder).linears.items():
            assert linear.weight.dtype == dtype
            assert torch.equal(linear.weight.float(), quantized.linears[name].weight.float())


@pytest.mark.parametrize(
    "scheme",
    [
        customised(scheme_named("int4-weight-only"), block_size=16),
        customised(
            scheme_named("int8"),
            weight_symmetric=False,
            activation_symmetric=False,
            activation_granularity="token",
        ),
        customised(scheme_named("w4a8"), activation_granularity="cluster:4"),
        scheme_named("float"),
    ],
    ids=["blocks", "zero points", "clusters", "float"],
)
def test_a_scheme_with_finer_controls_survives(
    model: QuantizedModel, scheme: Scheme, tmp_path: Path
) -> None:
    save_artifact(dataclasses.replace(model, scheme=scheme), tmp_path)
    assert load_artifact(tmp_path).scheme == scheme


def test_loaded_weights_are_mapped_not_copied(saved: Path) -> None:
    """A mapped tensor lies in the file's own mapping, so two reads of one file see the same
    pages.
    """
    loaded = load_artifact(saved)
    largest = max(loaded.linears.values(), key=lambda linear: linear.weight.numel())
    mapped = (saved / WEIGHTS).stat().st_size
    assert largest.weight.untyped_storage().nbytes() in (largest.weight.numel(), mapped)
    addresses = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(saved / WEIGHTS) in line
    ]
    assert any(start <= largest.weight.data_ptr() < end for start, end in addresses)


def test_it_holds_no_module_and_is_frozen(model: QuantizedModel) -> None:
    assert not [part for part in walk(model) if isinstance(part, nn.Module)]
    for part in (model, model.provenance, next(iter(model.linears.values()))):
        field = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, None)


def edit(**changes: Any) -> Callable[[Path], None]:
    def update(manifest: dict[str, Any]) -> None:
        for key, value in changes.items():
            if value is None:
                del manifest[key]
            else:
                manifest[key] = value

    return lambda folder: edit_sealed(folder / MANIFEST, update)


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def drop(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        save_file(
            {key: value for key, value in tensors.items() if not key.endswith(part)},
            folder / WEIGHTS,
        )
        edit()(folder)

    return change


def alter(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, key: change(tensors[key])}, folder / WEIGHTS)
        edit()(folder)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "is not a quantized model"),
        (lambda folder: (folder / MANIFEST).write_text('{"format_version": 1, '), "is damaged"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"), "is damaged"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "is damaged"),
        (edit(format_version=None), "is damaged"),
        (edit(linears=None), "is damaged"),
        (edit(dtype="float99"), "is damaged"),
        (edit(provenance={"gate": []}), "is damaged"),
        (edit(format_version=FORMAT_VERSION + 1), "format version 5, written by a newer rotq"),
        (edit(format_version=2, scheme="int8"), "format version 2, written by an older rotq"),
        (edit(scheme="int8"), "is damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), "safetensors is missing"),
        (truncate, "is damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "is damaged"),
        (drop("0.mlp.down_proj.weight"), "lacks 1 tensor.*'model.layers.0.mlp.down_proj.weight'"),
        (drop("weight_scale"), "lacks 14 tensor"),
        # these two are optional, and the model would run without them, on wrong numbers
        (drop("input_scale"), "lacks 14 tensor"),
        (drop("v_proj.bias"), "lacks 2 tensor"),
        (drop("embed_tokens.weight"), "lacks 1 tensor"),
        (alter(f"{DOWN}.weight_scale", torch.neg), "weight_scale is not positive and finite"),
        (alter(f"{DOWN}.weight_scale", torch.zeros_like), "weight_scale is not positive"),
        (alter(f"{DOWN}.input_scale", lambda x: x * torch.inf), "input_scale is not positive"),
        (alter(f"{DOWN}.weight", Tensor.float), "its weight is torch.float32"),
        (alter("model.layers.0.self_attn.v_proj.bias", lambda x: x[1:]), "its bias is"),
    ],
)
def test_damage_is_named_with_a_way_out(
    saved: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_artifact(saved)
    assert caught.value.hint


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        load_artifact(tmp_path / "absent")


@pytest.mark.parametrize("name", ["rotations.json", "rotations.safetensors"])
def test_missing_rotations_are_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(RotationError, match="cannot be read") as caught:
        load_artifact(saved)
    assert caught.value.hint


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_in_any_file_is_found(saved: Path, share: float) -> None:
    """Scales, signs and exponents: the numbers are as likely as before."""
    for path in sorted(path for path in saved.iterdir() if path.is_file()):
        data = path.read_bytes()
        for bit in (0, 6):
            path.write_bytes(flipped(data, int(share * (len(data) - 1)), bit))
            with pytest.raises((CheckpointError, RotationError)):
                load_artifact(saved)
        path.write_bytes(data)
    load_artifact(saved)
