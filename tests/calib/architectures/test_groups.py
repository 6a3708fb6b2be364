"""Which linears read one tensor, and which of these a runtime merges, by the table alone."""

from __future__ import annotations

import pytest

from calib.architectures import wiring_for
from calib.architectures.groups import merged_linears, reading_groups
from tests.rows import EVERY
from tests.tiny import CONFIGS


@pytest.mark.parametrize("name", list(EVERY))
def test_groups_hold_every_linear_once_in_topological_order(name: str) -> None:
    config = EVERY[name]()
    wiring = wiring_for(config)
    groups = reading_groups(wiring)
    everything = list(wiring.quantizable)
    assert [linear for group in groups for linear in group] == everything
    layers = range(wiring.sizes.layers)
    assert groups == [group for layer in layers for group in reading_groups(wiring, layer)]
    merged = merged_linears(wiring)
    assert list(merged) == everything
    assert all(linear in merged[linear] for linear in merged)


@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma2"])
def test_query_key_and_value_are_merged_and_gate_and_up(name: str) -> None:
    config = CONFIGS[name]()
    merged = merged_linears(wiring_for(config))
    layer = "model.layers.1."
    attention = tuple(f"{layer}self_attn.{part}_proj" for part in "qkv")
    mlp = tuple(f"{layer}mlp.{part}_proj" for part in ("gate", "up"))
    alone = [f"{layer}self_attn.o_proj", f"{layer}mlp.down_proj"]
    assert {linear: group for linear, group in merged.items() if layer in linear} == {
        **dict.fromkeys(attention, attention),
        **dict.fromkeys(mlp, mlp),
        **{linear: (linear,) for linear in alone},
    }


def test_what_holds_its_parts_already_is_merged_with_nothing() -> None:
    for name in ("gpt2", "phi3", "gpt_neox", "opt"):
        config = CONFIGS[name]()
        merged = merged_linears(wiring_for(config))
        fused = [linear for linear in merged if "q_proj" not in linear and "k_proj" not in linear]
        assert all(merged[linear] == (linear,) for linear in fused if "v_proj" not in linear)


def test_experts_are_matrices_of_their_own_and_the_shared_one_is_not() -> None:
    config = CONFIGS["qwen2_moe"]()
    merged = merged_linears(wiring_for(config))
    assert all(group == (name,) for name, group in merged.items() if ".experts." in name)
    shared = tuple(f"model.layers.1.mlp.shared_expert.{part}_proj" for part in ("gate", "up"))
    assert merged[shared[0]] == merged[shared[1]] == shared
