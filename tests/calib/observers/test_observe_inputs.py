"""Observing the inputs of linears during a forward loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.errors import CheckpointError, QuantizationError
from calib.observers import input_limits, observe_inputs, observer_named
from calib.schemes import INT8, PerCluster, PerTensor, TensorScheme
from tests.tiny import CONFIGS, make_tiny, token_rows

static = TensorScheme(INT8, PerTensor())


class Branches(nn.Module):
    """Three linears, of which the last is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=self.first(x).relu())


def test_each_input_has_an_observer_of_its_own_and_hooks_go() -> None:
    torch.manual_seed(0)
    model = Branches()
    batches = [torch.randn(3, 4), torch.randn(2, 5, 4)]

    def run(module: nn.Module) -> None:
        for batch in batches:
            assert not module(batch).requires_grad

    found = observe_inputs(
        model, ["first", "second"], lambda name: observer_named("min_max")(static), run
    )
    assert list(found) == ["first", "second"]
    assert found["first"].count == sum(batch.numel() for batch in batches)
    assert float(found["first"].limits()[1]) == max(float(batch.max()) for batch in batches)
    assert float(found["second"].limits()[0]) == 0
    count = found["first"].count
    model(batches[0])
    assert found["first"].count == count


def test_the_forward_loop_of_a_model_gives_what_all_rows_give() -> None:
    model = make_tiny(CONFIGS["llama"]()).model(torch.float32)
    name = "model.layers.1.mlp.down_proj"
    rows = token_rows()
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    with torch.no_grad():
        for batch in length_batches(rows, 2):
            model(batch.input_ids)
    handle.remove()
    found = input_limits(
        model, {name: static}, "min_max", forward_loop_over(length_batches(rows, 2))
    )
    assert found[name] == (min(x.min() for x in seen), max(x.max() for x in seen))
    clustered = input_limits(
        model,
        {name: TensorScheme(INT8, PerCluster(3))},
        "min_max",
        forward_loop_over(length_batches(rows, 2)),
    )
    low, high = clustered[name]
    assert low.shape == high.shape == (88,)
    assert len(set(zip(low.tolist(), high.tolist(), strict=True))) == 3
    assert high.max() == found[name][1]


def test_unreached_modules_are_named() -> None:
    model = Branches()
    with pytest.raises(QuantizationError, match=r"never reached 1 module\(s\): spare"):
        input_limits(
            model,
            dict.fromkeys(["first", "spare"], static),
            "mse",
            lambda module: module(torch.ones(1, 4)),
        )


def test_an_empty_forward_loop_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"never reached 2 module\(s\): first, second"):
        input_limits(
            Branches(), dict.fromkeys(["first", "second"], static), "min_max", lambda _: None
        )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named_and_hooks_go(bad: float) -> None:
    model = Branches()
    with pytest.raises(QuantizationError, match="NaN or Inf in the input of first"):
        input_limits(
            model, {"first": static}, "percentile", lambda module: module(torch.full((1, 4), bad))
        )
    assert not model.first._forward_pre_hooks


def test_unknown_names() -> None:
    with pytest.raises(QuantizationError, match="unknown observer 'max'"):
        input_limits(Branches(), {"first": static}, "max", lambda _: None)
    with pytest.raises(CheckpointError, match="no submodule 'third'"):
        input_limits(Branches(), {"third": static}, "min_max", lambda _: None)
