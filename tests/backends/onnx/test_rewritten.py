"""What a trace computes in another form than transformers does, against transformers' own."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from backends.onnx.complex_rotary import _HEADS, _applied
from backends.onnx.placeholders import _biased, _with_sinks
from calib.modules.attention import attend
from tests.tiny import relative_l2

EXACT = 1e-12
"""Of the same sums in float64."""


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _qkv() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two rows, four heads over two, three queries behind two keys; the last row begins padded."""
    query, key, value = (
        _random(2, heads, n, 8, seed=n + heads) for heads, n in ((4, 3), (2, 5), (2, 6))
    )
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2).expand(2, 1, 3, 5).clone()
    mask[1, :, :, 0] = False
    return query, key, value[:, :, :5], mask


def _eager(sinks: Tensor) -> Tensor:
    query, key, value, mask = _qkv()
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.sinks, module.training = 2, sinks, False
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
    wanted: Tensor = eager_attention_forward(module, query, key, value, bias, 0.3)[0]
    return wanted


def test_a_sink_is_one_key_more() -> None:
    sinks = _random(4, seed=9)
    inputs = _with_sinks(*_qkv(), sinks / 0.3)
    found = attend(torch.matmul, *inputs, 0.3)
    assert relative_l2(found, _eager(sinks)) <= EXACT
    assert relative_l2(found, _eager(sinks + 1.0)) > 1e-3


def test_a_mask_that_is_a_bias_is_added_to_the_scores() -> None:
    query, key, value, mask = _qkv()
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
    wanted = attend(torch.matmul, query, key, value, mask, 0.3, 5.0)
    assert relative_l2(_biased(query, key, value, bias, 0.3, 5.0), wanted) <= EXACT


@pytest.mark.parametrize("model_type", _HEADS)
def test_pairs_turn_as_complex_numbers_do(model_type: str) -> None:
    folder = model_type.removesuffix("_text")
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    axis = _HEADS[model_type]
    query, key = (_random(2, 3, 3, 8, seed=seed).float() for seed in (1, 2))
    phases = _random(2, 3, 4, seed=3).float()
    wanted = modeling.apply_rotary_emb(query, key, torch.polar(torch.ones_like(phases), phases))
    found = _applied(axis, query, key, torch.stack([phases.cos(), phases.sin()], dim=-1))
    for one, other in zip(found, wanted, strict=True):
        assert relative_l2(one, other) <= 1e-6  # float32, in which transformers computes them
