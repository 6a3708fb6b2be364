"""Massive tokens are found where they are, counted as often as they are there, and nothing is put
in front of a model that has none.
"""

from __future__ import annotations

import torch

from calib.fusing import FusedModel, fuse, materialize
from calib.rotations.rotation_set import RotationSet
from calib.stats.massive import MASSIVE, choose_prefix, massive_inputs
from tests.tiny import CONFIGS, make_tiny, token_rows

MASSIVE_TOKEN = 7
ROWS = [torch.cat([row, torch.tensor([MASSIVE_TOKEN])]) for row in token_rows((20,) * 6, seed=5)]


def fused(factor: float) -> FusedModel:
    """A model in which one direction of the residual stream belongs to one token, and to one row of
    the up and the gate projection, which multiply to ``factor`` squared.
    """
    tiny = make_tiny(CONFIGS["llama"]())
    table = tiny.state["model.embed_tokens.weight"]
    table[:, 0] = 0
    table[MASSIVE_TOKEN] = 0
    table[MASSIVE_TOKEN, 0] = 100  # more than what the attention adds
    for part in ("gate_proj", "up_proj"):
        weight = tiny.state[f"model.layers.0.mlp.{part}.weight"]
        weight[:, 0] = 0
        weight[0] = 0
        weight[0, 0] = factor
    return fuse(tiny.state, tiny.wiring, RotationSet(), dtype=torch.float32)


def test_a_massive_token_is_found_at_the_input_that_it_ruins() -> None:
    model = fused(40.0)
    found = massive_inputs(materialize(model), model.wiring.linear_names, ROWS)
    worst = found[0]
    assert worst.name == "model.layers.0.mlp.down_proj"
    assert worst.ratio > MASSIVE
    assert set(worst.tokens) == {MASSIVE_TOKEN}
    assert len(worst.tokens) == sum(int((row == MASSIVE_TOKEN).sum()) for row in ROWS)
    assert [each.ratio for each in found] == sorted((each.ratio for each in found), reverse=True)
    # linears that read the same values are there once
    assert not any(each.name.endswith(("k_proj", "v_proj", "up_proj")) for each in found)


def test_what_no_prefix_cures_gets_none() -> None:
    """The token is massive by itself: one in front does not take its place."""
    choice = choose_prefix(fused(40.0), ROWS, [MASSIVE_TOKEN, 3])
    assert choice.tokens == ()
    assert choice.before[0].ratio > MASSIVE
    assert "model.layers.0.mlp.down_proj" in choice.reason


def test_a_model_without_massive_tokens_is_left_alone() -> None:
    choice = choose_prefix(fused(0.1), ROWS, [3])
    assert choice.tokens == ()
    assert choice.before[0].ratio <= MASSIVE
