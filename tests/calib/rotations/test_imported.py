"""Rotations made elsewhere: which files are understood, what is said of where they come from, and
what is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from calib.errors import RotationError
from calib.rotations.files import save_rotations
from calib.rotations.foreign import export_dartquant, import_rotations
from calib.rotations.rotation_set import RotationSet
from calib.rotations.starts import haar_start
from tests.tiny import SIZES, Tiny, make_tiny

R2_KEY = "model.layers.{}.self_attn.R2"


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return make_tiny(transformers.LlamaConfig(**SIZES))


@pytest.fixture
def rotations(tiny: Tiny) -> RotationSet:
    return tiny.rotations(["r1", "r2"])


def read(tiny: Tiny, *paths: Path) -> RotationSet:
    return import_rotations(paths, tiny.wiring)


def assert_same(found: RotationSet, wanted: RotationSet) -> None:
    assert set(found) == set(wanted)
    for name, rotation in wanted.items():
        # The importer projects onto the nearest orthogonal matrix, in float64.
        torch.testing.assert_close(found[name].dense(), rotation.dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["", "rotations.safetensors"])
def test_rotqs_own_folder_or_file_is_read_whole(tiny: Tiny, tmp_path: Path, path: str) -> None:
    wanted = tiny.rotations(["r1", "r2", "r3", "r4"])
    save_rotations(wanted, tmp_path)
    found = read(tiny, tmp_path / path)
    assert_same(found, wanted)
    assert found["R4.1"].seed == wanted["R4.1"].seed
    assert found["R4.1"].origin == f"{wanted['R4.1'].origin}, from rotations.safetensors"


def test_dartquants_two_files_make_one_set(
    tiny: Tiny, rotations: RotationSet, tmp_path: Path
) -> None:
    export_dartquant(rotations, tmp_path)
    found = read(tiny, tmp_path / "r1.pt", tmp_path / "r2.pt")
    assert_same(found, rotations)
    assert {rotation.origin for rotation in found.values()} == {
        "DartQuant, from r1.pt",
        "DartQuant, from r2.pt",
    }
    assert_same(read(tiny, tmp_path), rotations)


def test_spinquants_file_is_read(tiny: Tiny, rotations: RotationSet, tmp_path: Path) -> None:
    shared = haar_start(8, 3)
    torch.save(
        {"R1": rotations["R1"].dense(), **{R2_KEY.format(i): shared for i in range(2)}},
        tmp_path / "R.bin",
    )
    found = read(tiny, tmp_path / "R.bin")
    assert found["R1"].origin == "SpinQuant, from R.bin"
    torch.testing.assert_close(found["R2.1"].dense(), shared.expand(2, 8, 8), rtol=0, atol=1e-12)


def test_a_matrix_that_is_not_orthogonal_is_refused_with_the_figure(
    tiny: Tiny, tmp_path: Path
) -> None:
    torch.save({"R1": 1.001 * haar_start(48, 0)}, tmp_path / "r1.pt")
    with pytest.raises(RotationError, match=r"R1 from DartQuant is not orthogonal: .* is 2\.0e-03"):
        read(tiny, tmp_path / "r1.pt")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"R1": torch.eye(32)}, r"R1 has shape \[32, 32\] but the model needs \[48, 48\]"),
        ({R2_KEY.format(0): torch.eye(8)}, r"R2 for some layers only; missing: 1\n"),
        ({R2_KEY.format(i): torch.eye(4) for i in range(2)}, r"R2\.0 has shape \[2, 4, 4\]"),
        ({R2_KEY.format(7): torch.eye(8)}, r"R2\.7 names a layer"),
        ({}, "hold no rotation"),
    ],
    ids=[
        "R1 of another model",
        "a layer is missing",
        "R2 of another model",
        "a layer too many",
        "empty",
    ],
)
def test_what_does_not_fit_is_refused(
    tiny: Tiny, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    torch.save(tensors, tmp_path / "r1.pt")
    with pytest.raises(RotationError, match=message):
        read(tiny, tmp_path / "r1.pt")


def test_the_same_rotation_twice_is_refused(
    tiny: Tiny, rotations: RotationSet, tmp_path: Path
) -> None:
    export_dartquant(rotations, tmp_path)
    with pytest.raises(RotationError, match="R1 is given twice"):
        read(tiny, tmp_path / "r1.pt", tmp_path / "r1.pt")


def test_paths_that_hold_no_rotations_are_refused_with_what_would(
    tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "rotations.safetensors", "model.safetensors"):
        (tmp_path / "empty" / name).write_text("") if name == "notes.txt" else (
            tmp_path / name
        ).write_text("")
    for path in (
        "nowhere",
        "empty",
        "empty/notes.txt",
        "rotations.safetensors",
        "model.safetensors",
    ):
        with pytest.raises(RotationError) as caught:
            read(tiny, tmp_path / path)
        assert caught.value.hint is not None
        assert "R.bin" in caught.value.hint
