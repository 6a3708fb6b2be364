"""The one watch harness: what is shown, to whom, and what is refused, on a whole model or a single
block of one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.errors import (
    CheckpointError,
    NotFiniteError,
    QuantizationError,
    UnsupportedModelError,
)
from calib.modules.watch import require_finite, watching


class Block(nn.Module):
    """Two linears, the second of which is called with a keyword, and one that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(input=self.first(x))
        return result


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def hooks(network: nn.Module) -> int:
    return sum(
        len(each._forward_pre_hooks) + len(each._forward_hooks) for each in network.modules()
    )


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_inputs_and_outputs_are_shown_uncopied() -> None:
    block, shown = Block(), list[Any]()
    with watching(
        block,
        inputs={"first": shown.append},
        outputs={"second": lambda x, y: shown.append((x, y))},
    ) as watch:
        result = block(X)
    assert shown[0] is X
    assert torch.equal(shown[1][0], block.first(X))
    assert shown[1][1] is result
    assert not result.requires_grad
    assert watch.reached == {"first", "second"}
    assert hooks(block) == 0


@pytest.mark.parametrize("prefix", ["", "layers.1."])
def test_a_block_is_watched_like_a_model(prefix: str) -> None:
    network = Model() if prefix else Block()
    shown: list[Tensor] = []
    with watching(network, inputs={f"{prefix}second": shown.append}):
        network(X)
    assert len(shown) == 1


def test_what_a_function_returns_takes_the_place_of_the_input() -> None:
    block = Block()
    with (
        watching(block, inputs={"first": torch.zeros_like, "second": lambda x: x + 1}),
        torch.no_grad(),
    ):
        found = block(X)
    expected = block.second(block.first(torch.zeros_like(X)) + 1)
    assert torch.equal(found, expected)


def test_arguments_are_shown_as_they_are_given() -> None:
    block, shown = Block(), list[Tensor]()
    with watching(block, calls={"second": lambda *, input: shown.append(input)}):
        block(X)
    assert len(shown) == 1


def test_what_looks_first_sees_the_input_before_other_hooks() -> None:
    block = Block()
    block.first.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    seen: list[Tensor] = []
    for first in (True, False):
        with watching(block, inputs={"first": seen.append}, first=first):
            block(X)
    assert torch.equal(seen[1], 2 * seen[0])


def test_what_was_never_reached_is_named() -> None:
    model = Model()
    names = ["layers.0.idle", "layers.0.first", "layers.1.idle"]
    with (
        pytest.raises(
            QuantizationError, match=r"never reached 2 module\(s\): layers.0.idle, layers.1.idle"
        ) as caught,
        watching(model, inputs=dict.fromkeys(names, lambda x: None)),
    ):
        model(X)
    assert "--nsamples" in str(caught.value.hint)
    with watching(model, inputs={"layers.0.idle": lambda x: None}, optional=True):
        model(X)
    assert hooks(model) == 0


def test_a_module_that_sees_no_token_is_not_reached() -> None:
    block = Block()
    with (
        pytest.raises(QuantizationError, match="never reached 1"),
        watching(block, inputs={"first": lambda x: None}),
    ):
        block(X[:0])


def test_nan_gets_the_name_of_its_module() -> None:
    block = Block()

    def look(x: Tensor) -> None:
        if not bool(torch.isfinite(x).all()):
            raise NotFiniteError("an observed tensor holds NaN or Inf")

    block.first.weight.data.fill_(torch.inf)
    with (
        pytest.raises(NotFiniteError, match="NaN or Inf in the input of second"),
        watching(block, inputs={"first": look, "second": look}) as watch,
    ):
        block(X)
    assert watch.last == "second"
    assert hooks(block) == 0


def test_statistics_that_are_not_finite_are_named() -> None:
    require_finite({"first": torch.ones(2)})
    with pytest.raises(NotFiniteError, match="in the weights of b, c"):
        require_finite(
            {"a": torch.ones(1), "b": torch.tensor([1, torch.nan]), "c": torch.tensor(torch.inf)},
            of="the weights of ",
        )


def test_an_error_of_the_loop_is_its_own_and_hooks_go() -> None:
    block = Block()
    with (
        pytest.raises(KeyError, match="the loop"),
        watching(block, inputs={"idle": lambda x: None}),
    ):
        raise KeyError("the loop")
    assert hooks(block) == 0


def test_what_cannot_be_watched_is_refused() -> None:
    block = Block()
    with (
        pytest.raises(CheckpointError, match="no submodule 'absent'"),
        watching(block, inputs={"first": lambda x: None, "absent": lambda x: None}),
    ):
        block(X)
    assert hooks(block) == 0

    idle = nn.Identity()
    with (
        pytest.raises(UnsupportedModelError, match="called without a tensor"),
        watching(nn.ModuleDict({"idle": idle}), inputs={"idle": lambda x: None}),
    ):
        idle(None)
