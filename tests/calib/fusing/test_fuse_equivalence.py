"""The fused model computes what the original computes: logits before and after, for every family in
the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.fusing import fuse, materialize
from calib.rotations.rotation_set import RotationSet

Patch = Callable[[Any], Any]
Distance = Callable[[Tensor, Tensor], float]


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@pytest.mark.parametrize("kinds", ["", "r1 r2 r3 r4"])
def test_float64_logits_agree(
    tiny: Any, kinds: str, tokens: Tensor, exact: Patch, relative: Distance
) -> None:
    offered = [kind for kind in kinds.split() if kind in tiny.offered()]
    rotations = tiny.rotations(offered)
    fused = fuse(tiny.state, tiny.wiring, rotations, dtype=torch.float64)
    reference = logits(exact(tiny.model()), tokens)
    assert relative(logits(exact(materialize(fused)), tokens), reference) <= 1e-10
    assert list(fused.state) == list(tiny.state)
    assert fused.unused == ()
    assert fused.refusals == ()


def test_float64_logits_of_every_row_agree(
    row: Any, tokens: Tensor, exact: Patch, relative: Distance
) -> None:
    """Norms and all rotations that are offered, at once."""
    fused = fuse(row.state, row.wiring, row.rotations(row.offered()), dtype=torch.float64)
    reference = logits(exact(row.model()), tokens)
    assert relative(logits(exact(materialize(fused)), tokens), reference) <= 1e-10
    assert list(fused.state) == list(row.state)


@pytest.mark.parametrize("kind", ["r1", "r2", "r3", "r4"])
@pytest.mark.parametrize(
    "name", ["llama-bias-tied-headdim", "gpt2", "gpt_neox", "phi3", "qwen2_moe"]
)
def test_each_rotation_alone(
    name: str,
    kind: str,
    tiny_of: Callable[[str], Any],
    tokens: Tensor,
    exact: Patch,
    relative: Distance,
) -> None:
    tiny = tiny_of(name)
    fused = fuse(tiny.state, tiny.wiring, tiny.rotations([kind]), dtype=torch.float64)
    reference = logits(exact(tiny.model()), tokens)
    assert relative(logits(exact(materialize(fused)), tokens), reference) <= 1e-10


def test_stock_norms_agree_in_float64_and_float32(
    tiny: Any, tokens: Tensor, relative: Distance
) -> None:
    rotations = tiny.rotations(tiny.offered())
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        fused = fuse(tiny.state, tiny.wiring, rotations, dtype=dtype)
        assert {tensor.dtype for tensor in fused.state.values()} == {dtype}
        assert (
            relative(logits(materialize(fused), tokens), logits(tiny.model(dtype), tokens)) <= bound
        )


def test_every_weight_that_a_rotation_reaches_changes(tiny: Any) -> None:
    plain = fuse(tiny.state, tiny.wiring, RotationSet(), dtype=torch.float64).state
    rotations = tiny.rotations(tiny.offered())
    rotated = fuse(tiny.state, tiny.wiring, rotations, dtype=torch.float64).state
    reached = {spec.weight for spec in tiny.wiring.linears}
    reached |= {table.weight for table in tiny.wiring.embeddings}
    unchanged = {name for name in reached if torch.allclose(plain[name], rotated[name], atol=1e-3)}
    if "r1" in tiny.offered():
        assert unchanged == set()
    else:  # R2 and R4 alone: values, attention outputs and down projections
        changed = [spec for spec in tiny.wiring.linears if spec.weight not in unchanged]
        assert {spec.name.rpartition(".")[2] for spec in changed} == {
            "v_proj",
            "o_proj",
            "down_proj",
        }


def test_input_is_left_unchanged_and_unshared(tiny_of: Callable[[str], Any]) -> None:
    tiny = tiny_of("llama-bias-tied-headdim")
    before = {name: tensor.clone() for name, tensor in tiny.state.items()}
    config_before = tiny.config.to_dict()
    fused = fuse(tiny.state, tiny.wiring, RotationSet(), dtype=torch.float64)
    for tensor in fused.state.values():
        tensor.fill_(7.0)
    assert all(torch.equal(tiny.state[name], before[name]) for name in before)
    assert tiny.config.to_dict() == config_before
    assert fused.config.tie_word_embeddings is False


def test_norms_are_left_with_gain_one_and_their_own_eps(tiny: Any) -> None:
    fused = fuse(tiny.state, tiny.wiring, RotationSet(), dtype=torch.float32)
    stored = 1.0 - tiny.wiring.architecture.gain_offset
    for norm in tiny.wiring.norm_names:
        gain = fused.state.get(f"{norm}.weight", torch.full((1,), stored))
        assert torch.equal(gain, torch.full_like(gain, stored))
    for attribute in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        assert getattr(fused.config, attribute, None) == getattr(tiny.config, attribute, None)


def test_bfloat16_costs_no_more_than_the_models_own_rounding(tiny: Any, tokens: Tensor) -> None:
    # Per token and in the median, because rounding sends a token of a sparse model to another
    # expert now and then.
    rotations = tiny.rotations(tiny.offered())
    reference = logits(tiny.model(), tokens)
    fused = fuse(tiny.state, tiny.wiring, rotations, dtype=torch.bfloat16)
    own, rotated = (
        (
            (logits(model, tokens).double() - reference).norm(dim=-1) / reference.norm(dim=-1)
        ).median()
        for model in (tiny.model(torch.bfloat16), materialize(fused))
    )
    assert rotated <= 2 * own


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_of_the_vocabulary_change_nothing(
    name: str, tiny_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_of(name)
    if name == "gpt2":
        tiny.state["transformer.ln_f.weight"][3] = 0.0  # so that the head gets a bias
    rotations = tiny.rotations(["r1"])
    whole = fuse(tiny.state, tiny.wiring, rotations, dtype=torch.float64).state
    monkeypatch.setattr("calib.fusing.fuser._ROWS", 10)
    blocks = fuse(tiny.state, tiny.wiring, rotations, dtype=torch.float64).state
    assert whole.keys() == blocks.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(blocks[key], tensor, rtol=1e-12, atol=1e-13)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_sizes(
    data: st.DataObject, tiny_from: Callable[[Any], Any], exact: Patch, relative: Distance
) -> None:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    heads = kv_heads * group
    config = transformers.LlamaConfig(
        vocab_size=data.draw(st.integers(5, 40)),
        hidden_size=heads * data.draw(st.integers(2, 9)),
        intermediate_size=data.draw(st.integers(1, 90)),
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * data.draw(st.integers(1, 8)),
        attention_bias=data.draw(st.booleans()),
        mlp_bias=data.draw(st.booleans()),
        tie_word_embeddings=data.draw(st.booleans()),
        rms_norm_eps=data.draw(st.sampled_from([1e-6, 1e-2])),
        pad_token_id=None,
    )
    tiny = tiny_from(config)
    tokens = torch.arange(4)[None]
    fused = fuse(tiny.state, tiny.wiring, tiny.rotations(tiny.offered()), dtype=torch.float64)
    assert (
        relative(logits(exact(materialize(fused)), tokens), logits(exact(tiny.model()), tokens))
        <= 1e-10
    )
