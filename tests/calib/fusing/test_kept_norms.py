"""Without R1 norms may stay as the checkpoint has them: nothing is folded that nothing needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.fusing import fuse, materialize
from calib.rotations.rotation_set import RotationSet
from tests.tiny import fuse_tiny

Patch = Callable[[Any], Any]
Distance = Callable[[Tensor, Tensor], float]


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def norm_tensors(tiny: Any) -> dict[str, Tensor]:
    """Gains and biases of the checkpoint."""
    names = [f"{norm}.{part}" for norm in tiny.wiring.norm_names for part in ("weight", "bias")]
    return {name: tiny.state[name] for name in names if name in tiny.state}


def test_without_a_rotation_every_tensor_is_the_checkpoint_s(tiny: Any) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        fused = fuse_tiny(tiny, dtype=dtype, fold_norms=False)
        assert not fused.norms_folded
        assert list(fused.state) == list(tiny.state)
        for name, tensor in fused.state.items():
            stored = tiny.state[name].to(dtype)
            turned = name in tiny.wiring.turned_weights
            assert torch.equal(tensor, stored.mT if turned else stored), name


def test_rotations_but_r1_leave_norms_alone_and_logits_as_they_are(
    tiny: Any, tokens: Tensor, exact: Patch, relative: Distance
) -> None:
    fused = fuse_tiny(tiny, ["r2", "r3", "r4"], torch.float64, fold_norms=False)
    assert not fused.norms_folded
    for name, tensor in norm_tensors(tiny).items():
        assert torch.equal(fused.state[name], tensor), name
    reference = logits(exact(tiny.model()), tokens)
    # A few thousand float64 products in another order; the same bound as with folded norms.
    assert relative(logits(exact(materialize(fused)), tokens), reference) <= 1e-10
    assert fused.refusals == ()


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "qwen2_moe"])
def test_r1_folds_norms_whatever_is_wanted(name: str, tiny_of: Callable[[str], Any]) -> None:
    tiny = tiny_of(name)
    kept, folded = (
        fuse_tiny(tiny, ["r1"], torch.float64, fold_norms=wanted) for wanted in (False, True)
    )
    assert kept.norms_folded
    assert all(torch.equal(kept.state[key], folded.state[key]) for key in folded.state)


def test_a_bias_that_no_reader_can_take_is_no_obstacle(tiny_of: Callable[[str], Any]) -> None:
    """Folded and rotated, a tiny gain makes GPT-2's last bias too large to stay in the norm."""
    tiny = tiny_of("gpt2")
    tiny.state["transformer.ln_f.weight"][7] = 1e-9
    folded = fuse_tiny(tiny, ["r1"])
    assert folded.refusals
    assert "lm_head.bias" in folded.state
    kept = fuse_tiny(tiny, fold_norms=False)
    assert kept.refusals == ()
    assert "lm_head.bias" not in kept.state


def test_lazily_gives_the_same_bytes(tiny: Any) -> None:
    held, lazy = (
        fuse(
            tiny.state,
            tiny.wiring,
            RotationSet(),
            dtype=torch.float32,
            fold_norms=False,
            lazy=flag,
        )
        for flag in (False, True)
    )
    assert not lazy.norms_folded
    assert list(lazy.state) == list(held.state)
    assert all(torch.equal(lazy.state[name], tensor) for name, tensor in held.state.items())
