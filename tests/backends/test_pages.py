"""Giving memory back: the values stay, and what lay in a file is no longer in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from backends.pages import release_pages

MEGABYTES = 32


def mapped_megabytes() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes this advice")
def test_a_mapped_tensor_leaves_memory_and_keeps_its_values(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.arange(MEGABYTES * 2**18, dtype=torch.int32)}, path)
    with safe_open(path, "pt") as shard:
        tensor = shard.get_tensor("w")
        total = int(tensor.sum())
        before = mapped_megabytes()
        release_pages(tensor)
        if mapped_megabytes() > before - MEGABYTES / 2:
            pytest.skip("this kernel does not take the advice")
        assert int(tensor.sum()) == total


def test_a_tensor_in_memory_keeps_its_values() -> None:
    tensor = torch.arange(2**20, dtype=torch.int32)
    for part in (tensor, tensor[3:], tensor[::2], tensor[:0]):
        release_pages(part)
    assert torch.equal(tensor, torch.arange(2**20, dtype=torch.int32))
