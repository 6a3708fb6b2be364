"""Rung 1 where weights are stored in a shorter dtype: they are judged, and not what a runtime loses
by computing in it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from calib.fusing import materialize
from exporter.parity.fold import FOLD_BOUND, FoldError, _same_tensors, fold_error
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, token_rows

SHORT = (torch.bfloat16, torch.float16)


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A model whose weights are those of a checkpoint in ``dtype``, and the rotated one."""
    tiny = make_tiny(CONFIGS[name]())
    stored = {key: tensor.to(dtype).double() for key, tensor in tiny.state.items()}
    tiny = replace(tiny, state=stored)
    rotated: nn.Module = materialize(fuse_tiny(tiny, ("r1", "r2"), dtype=dtype))
    original: nn.Module = tiny.model(torch.float32)
    return original, rotated


def compared(original: nn.Module, rotated: nn.Module, dtype: torch.dtype) -> FoldError:
    return fold_error(original, rotated, token_rows((24, 24)), dtype)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_rotated_weights_lose_what_rounding_once_more_loses(name: str, dtype: torch.dtype) -> None:
    original, rotated = pair(name, dtype)
    before = deepcopy(original.state_dict()), deepcopy(rotated.state_dict())
    error = compared(original, rotated, dtype)
    assert error.rounded is not None
    assert FOLD_BOUND < error.rotated <= error.bound
    # both are the rounding of the same number of weights, in two bases
    assert 0.5 <= error.rotated / error.rounded <= 2
    for model, states in zip((original, rotated), before, strict=True):
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, states[key])
            assert tensor.dtype == states[key].dtype


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_a_wrong_weight_is_seen(dtype: torch.dtype) -> None:
    original, rotated = pair("llama", dtype)
    weight = rotated.get_parameter("model.layers.0.mlp.down_proj.weight")
    weight.data = (weight.data.float() * 1.1).to(dtype)
    error = compared(original, rotated, dtype)
    assert error.rotated > error.bound


def test_float32_is_held_to_the_exact_bound() -> None:
    original, rotated = pair("llama", torch.float32)
    error = compared(original, rotated, torch.float32)
    assert error.rounded is None
    assert error.rotated <= error.bound == FOLD_BOUND


class Nested(nn.Module):
    """A module that shares its parameter with the one inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        self.weight = self.inner.weight

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inner(input_ids.float()) @ self.weight.T)


def test_a_parameter_of_two_modules_is_restored() -> None:
    model = Nested()
    before = model.weight.detach().clone()
    error = fold_error(deepcopy(model).float(), model, [torch.ones(4)], torch.bfloat16)
    assert error.rotated == 0
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, before)


def test_models_are_the_same_only_where_every_tensor_is() -> None:
    tiny = make_tiny(CONFIGS["llama"]())
    original: nn.Module = tiny.model(torch.float32)
    plain: nn.Module = materialize(fuse_tiny(tiny, (), dtype=torch.float32, fold_norms=False))
    assert _same_tensors(original, plain)
    # the last number of the last tensor, by the least step that there is
    weight = list(plain.parameters())[-1]
    weight.data = weight.data.clone()
    flat = weight.data.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
    assert not _same_tensors(original, plain)
