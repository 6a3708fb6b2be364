"""Modules whose train() and eval() differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.fake_quant import check_modes
from tests.tiny import CONFIGS, make_tiny, token_rows


class Hidden(nn.Module):
    """Differs in a way that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        y = self.inner(x) * scale
        return {"out": y + 1 if self.training else y}


class Attention(nn.Module):
    """Applies dropout by a function, as attention modules do."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.attention_dropout = p

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.attention_dropout, self.training)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Dropout(0.2), "dropout, p = 0.2"),
        (nn.AlphaDropout(0.5), "dropout, p = 0.5"),
        (nn.BatchNorm2d(3), "BatchNorm2d with running statistics"),
        (nn.InstanceNorm1d(3, track_running_stats=True), "InstanceNorm1d with running statistics"),
        (nn.RReLU(), "random slopes"),
        (Attention(0.1), "attention_dropout = 0.1"),
    ],
)
def test_known_kinds_are_found_by_rule(module: nn.Module, reason: str) -> None:
    assert check_modes(nn.Sequential(nn.Linear(3, 3), module)) == {"1": reason}


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.0),
        nn.LayerNorm(3),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.InstanceNorm1d(3),
        nn.RReLU(0.2, 0.2),
        Attention(0.0),
    ],
)
def test_modules_that_do_not_differ_are_not_named(module: nn.Module) -> None:
    assert check_modes(nn.Sequential(nn.Linear(3, 3), module)) == {}


def test_running_finds_what_rules_do_not_and_names_the_one_that_differs() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(inplace=True)), Hidden()
    )
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert list(check_modes(model)) == ["1.0"]
    model[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    assert check_modes(model, x) == {
        "1.0": "BatchNorm1d with running statistics",
        "2": "its outputs differ on the sample",
    }
    assert check_modes(model[2], {"x": x, "scale": 2.0}) == {"": "its outputs differ on the sample"}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_models_without_dropout_do_not_differ(family: str) -> None:
    model = make_tiny(CONFIGS[family]()).model(torch.float32)
    sample = {"input_ids": token_rows()[0].unsqueeze(0), "use_cache": False}
    assert check_modes(model, sample) == {}


def test_the_attention_of_gpt2_is_found_by_running() -> None:
    """It hands the probability of its dropout module to a fused kernel while training."""
    model = make_tiny(CONFIGS["gpt2"]()).model(torch.float32)
    found = check_modes(model, {"input_ids": token_rows()[0].unsqueeze(0), "use_cache": False})
    assert found["transformer.h.0.attn"] == "its outputs differ on the sample"
    assert found["transformer.drop"] == "dropout, p = 0.1"


class EvaluationOnly(nn.Linear):
    """Refuses to run in training mode."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("not in training mode")
        return super().forward(input)


def test_a_module_that_refuses_to_train_stays_in_evaluation() -> None:
    model = EvaluationOnly(3, 3).eval()
    with pytest.raises(RuntimeError, match="not in training mode"):
        check_modes(model, torch.ones(1, 3))
    assert not model.training
