"""A prefix in a bundle: there to the last bit, under a checksum, and only for targets with a reader
for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backends.base import Request, WriteOptions
from backends.safetensors.backend import SafetensorsBackend
from backends.safetensors.bundle import write_bundle
from backends.safetensors.file_names import PREFIX_FILES
from backends.safetensors.read import open_bundle, read_model, read_prefix
from calib.artifact import QuantizedModel
from calib.artifact.prefix import PREFIX_MANIFEST, PREFIX_TENSORS
from calib.errors import BackendError
from calib.fusing import with_prefix
from calib.measure.reference import build_reference
from tests.backends.safetensors.plain import PlainLayout
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, quantize_fused, token_rows

TOKENS = (5, 7, 11)
CARRY = ("tripy", "tensorrt")


def quantized(tokens: tuple[int, ...] = TOKENS) -> QuantizedModel:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()), ["r1", "r2", "r3", "r4"])
    return quantize_fused(with_prefix(fused, tokens, "it is massive"), "int8-weight-only")


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    return quantized()


@pytest.fixture
def folder(model: QuantizedModel, tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    write_bundle(model, PlainLayout(), tmp_path / "b", WriteOptions("plain"))
    return tmp_path / "b"


def test_it_comes_back_to_the_last_bit(model: QuantizedModel, folder: Path) -> None:
    found, expected = (
        read_model(open_bundle(folder, verify=True), PlainLayout()).prefix,
        model.prefix,
    )
    assert found is not None
    assert expected is not None
    assert (found.tokens, found.reason) == (TOKENS, "it is massive")
    assert found.keys.keys() == expected.keys.keys()
    for layer in expected.keys:
        assert torch.equal(found.keys[layer], expected.keys[layer])
        assert torch.equal(found.values[layer], expected.values[layer])


@pytest.mark.parametrize("target", CARRY)
def test_the_runner_has_it_in_place(model: QuantizedModel, target: str, tmp_path: Path) -> None:
    SafetensorsBackend().write(model, tmp_path, WriteOptions(target))
    ids = torch.stack(token_rows((9, 9), seed=3))
    positions = torch.arange(9).expand(2, 9)
    runtime = SafetensorsBackend().load(tmp_path, target, exact=True)
    found, _ = runtime.forward(ids, torch.ones_like(ids), positions)
    with torch.no_grad():
        expected = build_reference(model)(input_ids=ids).logits
    # the same integers and scales by the same torch code, but for a mask that is given
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    without = SafetensorsBackend()
    (tmp_path / "without").mkdir()
    without.write(quantized(()), tmp_path / "without", WriteOptions(target))
    other, _ = without.load(tmp_path / "without", target, exact=True).forward(
        ids, torch.ones_like(ids), positions
    )
    assert not torch.allclose(other, expected, atol=1e-2)


def test_a_bundle_without_one_has_no_such_files(tmp_path: Path) -> None:
    write_bundle(quantized(()), PlainLayout(), tmp_path, WriteOptions("plain"))
    assert not any((tmp_path / name).exists() for name in PREFIX_FILES)
    bundle = open_bundle(tmp_path, verify=True)
    assert read_prefix(bundle) is None


def test_one_that_the_manifest_does_not_list_is_not_taken(
    model: QuantizedModel, folder: Path
) -> None:
    plain = folder.parent / "plain"
    plain.mkdir()
    write_bundle(quantized(()), PlainLayout(), plain, WriteOptions("plain"))
    for name in PREFIX_FILES:
        (plain / name).write_bytes((folder / name).read_bytes())
    assert read_prefix(open_bundle(plain, verify=True)) is None


@pytest.mark.parametrize("name", PREFIX_FILES)
def test_damage_is_seen(name: str, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-5] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BackendError, match=f"{name} was changed: its checksum does not fit"):
        open_bundle(folder, verify=True)
    (folder / name).unlink()
    with pytest.raises(BackendError, match=f"{name} is missing"):
        open_bundle(folder)


def test_what_cannot_be_read_names_the_bundle(folder: Path) -> None:
    bundle = open_bundle(folder)
    path = folder / PREFIX_MANIFEST
    path.write_text(path.read_text(encoding="utf-8").replace('"tokens"', '"tokans"'))
    with pytest.raises(BackendError, match=r"the bundle '.*' is damaged: the prefix in"):
        read_prefix(bundle)


def test_the_names_are_those_of_the_artifact() -> None:
    assert PREFIX_FILES == (PREFIX_TENSORS, PREFIX_MANIFEST)


@pytest.mark.parametrize("target", SafetensorsBackend.targets)
def test_who_takes_it(target: str) -> None:
    backend = SafetensorsBackend()
    reasons = [reason.name for reason in backend.refusals(Request(target, prefix=3))]
    assert reasons == ([] if target in CARRY else ["prefix"])


def test_a_dry_run_names_its_files() -> None:
    backend = SafetensorsBackend()
    without, with_it = (
        set(backend.files(Request("tripy", prefix=tokens), 1000)) for tokens in (0, 3)
    )
    assert with_it - without == set(PREFIX_FILES)
    assert without < with_it
