"""Hidden states come back as they went in, from memory or from disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.errors import CheckpointError
from calib.layerwise.activations import Activations

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def chunk(index: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(2, index + 1, 5, generator=torch.Generator().manual_seed(index)).to(dtype)
    values[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    return values


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype is right.dtype and torch.equal(
        left.view(torch.uint8), right.view(torch.uint8)
    )


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 400), st.booleans(), st.integers(0, 5))
def test_round_trip_is_bit_for_bit(
    dtype: torch.dtype, max_memory: int, persist: bool, count: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Activations(Path(folder) / "hidden", max_memory, persist=persist)
        for index in range(count):
            store.append(chunk(index, dtype))
        assert len(store) == count
        assert all(same_bits(store[index], chunk(index, dtype)) for index in reversed(range(count)))
        if persist:
            again = Activations(
                Path(folder) / "hidden", max_memory, persist=True, existing=store.digests
            )
            assert len(again) == count
            assert all(same_bits(again[index], chunk(index, dtype)) for index in range(count))
        store.delete()
        assert not (Path(folder) / "hidden").exists()


def test_only_what_exceeds_the_budget_goes_to_disk(tmp_path: Path) -> None:
    """Chunks of 40, 80, 120 ... bytes: the third does not fit into what the first two leave of
    200.
    """
    store = Activations(tmp_path / "hidden", 200, persist=False)
    for index in range(4):
        store.append(chunk(index, torch.float32))
    assert sorted(path.name for path in (tmp_path / "hidden").iterdir()) == [
        "00002.safetensors",
        "00003.safetensors",
    ]


def test_what_fits_touches_no_disk(tmp_path: Path) -> None:
    store = Activations(tmp_path / "hidden", 1000, persist=False)
    store.append(chunk(0, torch.float32))
    assert not (tmp_path / "hidden").exists()


def test_left_over_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "00007.safetensors").touch()
    Activations(tmp_path / "hidden", 0, persist=True)
    assert not (tmp_path / "hidden").exists()


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_damaged_chunk_is_named(tmp_path: Path, damage: str) -> None:
    store = Activations(tmp_path, 0, persist=True)
    for index in range(3):
        store.append(chunk(index, torch.float32))
    file = tmp_path / "00001.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"00001\.safetensors' is missing or damaged"):
        Activations(tmp_path, 0, persist=True, existing=store.digests)
