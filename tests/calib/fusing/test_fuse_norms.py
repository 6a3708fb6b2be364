"""Where the gain and bias of a norm go, above all where no reader can take the bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.errors import RotationError
from calib.fusing import fuse, materialize
from calib.fusing.norms import fold_norm
from calib.rotations.rotation_set import RotationSet, fused_rotation
from calib.rotations.starts import haar_start


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def test_bias_goes_to_readers_that_have_one(tiny_of: Callable[[str], Any]) -> None:
    tiny = tiny_of("gpt2")
    fused = fuse(tiny.state, tiny.wiring, tiny.rotations(["r1"]), dtype=torch.float64)
    assert torch.count_nonzero(fused.state["transformer.h.0.ln_1.bias"]) == 0
    assert torch.count_nonzero(fused.state["transformer.ln_f.bias"]) == 48  # the head has none


def test_kept_bias_is_divided_by_the_gain_and_rotated(tiny_of: Callable[[str], Any]) -> None:
    tiny = tiny_of("gpt2")
    rotations = tiny.rotations(["r1"])
    fused = fuse(tiny.state, tiny.wiring, rotations, dtype=torch.float64)
    quotient = tiny.state["transformer.ln_f.bias"] / tiny.state["transformer.ln_f.weight"]
    torch.testing.assert_close(
        fused.state["transformer.ln_f.bias"], quotient @ rotations["R1"].dense()
    )


@pytest.mark.parametrize("gain", [1e-9, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tiny_gain_gives_the_head_a_bias_and_a_refusal(
    tiny_of: Callable[[str], Any],
    gain: float,
    dtype: torch.dtype,
    tokens: Tensor,
    relative: Callable[[Tensor, Tensor], float],
) -> None:
    tiny = tiny_of("gpt2")
    tiny.state["transformer.ln_f.weight"][7] = gain
    tiny.state["transformer.ln_f.bias"][7] = 0.5
    fused = fuse(tiny.state, tiny.wiring, tiny.rotations(["r1", "r2"]), dtype=dtype)
    assert len(fused.refusals) == 1
    assert "transformer.ln_f" in fused.refusals[0]
    assert "lm_head.bias" in fused.state
    assert torch.count_nonzero(fused.state["transformer.ln_f.bias"]) == 0
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert relative(logits(materialize(fused), tokens), logits(tiny.model(), tokens)) <= bound


def test_channel_without_gain_or_bias_is_no_obstacle() -> None:
    gain, bias = torch.ones(8, dtype=torch.float64), torch.full((8,), 0.3, dtype=torch.float64)
    gain[2] = bias[2] = 0.0
    fold = fold_norm("norm", gain, bias, readers_have_bias=False, r1=None, dtype=torch.bfloat16)
    assert fold.refusal is None
    assert fold.kept_bias is not None
    assert fold.kept_bias[2] == 0


def test_overflowing_quotient_is_refused_in_float16() -> None:
    gain, bias = torch.ones(8, dtype=torch.float64), torch.full((8,), 0.3, dtype=torch.float64)
    gain[2] = 1e-6
    assert fold_norm(
        "norm", gain, bias, readers_have_bias=False, r1=None, dtype=torch.float16
    ).refusal
    assert (
        fold_norm("norm", gain, bias, readers_have_bias=False, r1=None, dtype=torch.float32).refusal
        is None
    )


def test_layer_norm_models_refuse_an_r1_that_moves_the_ones(tiny_of: Callable[[str], Any]) -> None:
    tiny = tiny_of("gpt2")
    general = RotationSet([fused_rotation("r1", haar_start(48, 1))])
    with pytest.raises(RotationError, match=r"moves the all-ones vector by \d"):
        fuse(tiny.state, tiny.wiring, general, dtype=torch.float32)


def test_folding_norms_alone_leaves_embeddings_as_they_are(tiny_of: Callable[[str], Any]) -> None:
    tiny = tiny_of("llama-bias-tied-headdim")
    fused = fuse(tiny.state, tiny.wiring, RotationSet(), dtype=torch.float64)
    assert torch.equal(
        fused.state["model.embed_tokens.weight"], tiny.state["model.embed_tokens.weight"]
    )
    folded = tiny.state["model.embed_tokens.weight"] * tiny.state["model.norm.weight"]
    torch.testing.assert_close(fused.state["lm_head.weight"], folded, rtol=1e-15, atol=0)


def test_one_rounding_only(tiny_of: Callable[[str], Any]) -> None:
    tiny = tiny_of("qwen2")
    rotations = tiny.rotations(["r1", "r2"])
    exact = fuse(tiny.state, tiny.wiring, rotations, dtype=torch.float64).state
    rounded = fuse(tiny.state, tiny.wiring, rotations, dtype=torch.bfloat16).state
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
