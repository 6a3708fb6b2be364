"""Names that a checkpoint may hold, by the table alone, against the module tree of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from calib.architectures.stored import is_buffer, uncalled_names
from calib.network.skeleton import expected_tensors
from tests.rows import EVERY
from tests.tiny import CONFIGS


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_every_tensor_of_the_module_tree_is_called_for(config: Callable[[], Any]) -> None:
    made = config()
    assert uncalled_names(expected_tensors(made), made.to_dict()) == []


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_a_bias_that_the_module_tree_lacks_is_not(config: Callable[[], Any]) -> None:
    made = config()
    expected = expected_tensors(made)
    linears = [
        name.removesuffix(".weight")
        for name, shape in expected.items()
        if name.endswith(".weight") and len(shape) == 2 and ".layers." in name
    ]
    lacking = [f"{name}.bias" for name in linears if f"{name}.bias" not in expected]
    assert uncalled_names([*expected, *lacking], made.to_dict()) == sorted(lacking)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_layers_beyond_those_of_the_config_are_not_called_for(name: str) -> None:
    made = CONFIGS[name]()
    deeper = CONFIGS[name]()
    deeper.num_hidden_layers = 3
    beyond = uncalled_names(expected_tensors(deeper), made.to_dict())
    assert beyond
    assert all(".2." in each for each in beyond)
    assert not {each for each in expected_tensors(deeper) if ".2." in each} - set(beyond)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "h.0.attn.bias",
        "transformer.h.11.attn.masked_bias",
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
    ],
)
def test_buffers_of_older_versions_pass(name: str) -> None:
    assert is_buffer(name)


@pytest.mark.parametrize(
    "name", ["h.0.attn.c_attn.bias", "gpt_neox.layers.0.attention.dense.bias", "score.weight"]
)
def test_parameters_are_no_buffers(name: str) -> None:
    assert not is_buffer(name)
