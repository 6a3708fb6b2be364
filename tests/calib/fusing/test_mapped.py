"""A fused model on the disk is the one that was in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calib.fusing.mapped import mapped
from tests.tiny import CONFIGS, fuse_tiny, make_tiny


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # whose linears are stored [in, out]
def test_every_tensor_is_the_same_and_may_outlive_its_file(name: str, tmp_path: Path) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS[name]()), ["r1"], torch.bfloat16)
    found = mapped(fused, tmp_path)
    (file,) = tmp_path.iterdir()
    file.unlink()
    assert list(found.state) == list(fused.state)
    for key, tensor in fused.state.items():
        assert found.state[key].dtype == tensor.dtype
        assert torch.equal(found.state[key], tensor)


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()), ["r1"], torch.float32)
    one, other = list(fused.state)[:2]
    assert isinstance(fused.state, dict)
    fused.state[other] = fused.state[one]
    found = mapped(fused, tmp_path)
    assert torch.equal(found.state[one], found.state[other])
