"""Second moments: against the plain product of all tokens, and who shares one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.errors import CheckpointError, QuantizationError, UnsupportedModelError
from calib.weights.moments import Moment, observe_moments
from tests.tiny import CONFIGS, make_tiny, relative_l2, token_rows

LAYER = "model.layers.1"
LINEARS = [
    f"{LAYER}.{name}"
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


def tokens_of(count: int, channels: int, seed: int = 0) -> Tensor:
    """With a mean as large as the deviations."""
    return (
        torch.randn(
            count, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        + 1
    )


def moment_of(x: Tensor) -> Moment:
    moment = Moment(x.shape[-1])
    moment.update(x)
    return moment


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 30), st.booleans())
def test_chunks_and_merges_add_up(counts: list[int], channels: int, merged: bool) -> None:
    x = tokens_of(sum(counts), channels)
    total = Moment(channels)
    for chunk in x.split(counts):
        if merged:
            total.merge(moment_of(chunk))
        else:
            total.update(chunk)
    assert total.tokens == len(x)
    if len(x):
        # float64 all the way: sums of up to 300 terms in another order
        torch.testing.assert_close(total.result(), x.T @ x / len(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "channels"), [(torch.float32, 24), (torch.bfloat16, 24), (torch.float32, 600)]
)
def test_float32_products(dtype: torch.dtype, channels: int) -> None:
    """Of more tokens than a chunk has and, at 600 channels, in more than one block of rows."""
    x = tokens_of(5000, channels).to(dtype)
    wide = x.double()
    # products of up to 2048 tokens in float32: √2048 roundings of half an eps
    bound = math.sqrt(2048) * torch.finfo(torch.float32).eps / 2
    assert (
        relative_l2(moment_of(x.reshape(50, 100, channels)).result(), wide.T @ wide / 5000) < bound
    )


def test_nothing_seen_is_no_moment() -> None:
    with pytest.raises(QuantizationError, match="no token has been seen"):
        moment_of(torch.zeros(0, 4)).result()


def watched(
    model: nn.Module, names: list[str], run: Callable[[nn.Module], None]
) -> dict[str, Tensor]:
    """All input tokens of each module, by hooks of our own."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].detach().clone().flatten(0, -2))
        )
        for name in names
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs) for name, inputs in found.items()}


def test_each_linear_of_a_model_gets_the_moment_of_its_input() -> None:
    model = make_tiny(CONFIGS["llama"]()).model(torch.float32)
    loop = forward_loop_over(length_batches(token_rows(), 2))
    moments = observe_moments(model, LINEARS, loop)
    inputs = watched(model, LINEARS, loop)
    assert list(moments) == LINEARS
    for name, x in inputs.items():
        assert moments[name].tokens == len(x) == sum(len(row) for row in token_rows())
        # float32 products of 43 tokens
        assert relative_l2(moments[name].result(), x.double().T @ x.double() / len(x)) < 1e-6
    q, k, v, o, gate, up, down = (moments[name] for name in LINEARS)
    assert q is k is v
    assert gate is up
    assert len({id(moment) for moment in (q, o, gate, down)}) == 4
    assert not any(module._forward_pre_hooks for module in model.modules())


class Branches(nn.Module):
    """Two linears whose inputs are the same tensor, a view of it, a copy, or one that is written to
    in between.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        match self.how:
            case "copy":
                x = x.clone()
            case "view":
                x = x.view(x.shape)
            case "keyword":
                return y + self.b(input=x)
            case "written":
                x += 1
            case "part":
                x = x[:1]
        return y + self.b(x)


KINDS = ["same", "view", "keyword", "copy", "part", "written"]


@pytest.mark.parametrize(
    ("how", "inference"),
    # inference tensors do not tell that they have been written to
    [*((how, False) for how in KINDS), *((how, True) for how in KINDS[:-1])],
)
def test_only_the_very_same_tensor_is_shared(how: str, inference: bool) -> None:
    x = torch.arange(12.0).reshape(3, 4)

    def run(module: nn.Module) -> None:
        with torch.inference_mode(inference):
            for _ in range(2):
                module(x.clone())

    moments = observe_moments(Branches(how), ["a", "b"], run)
    assert (moments["a"] is moments["b"]) == (how in ("same", "view", "keyword"))
    second = x + 1 if how == "written" else x[:1] if how == "part" else x
    for name, seen in (("a", x), ("b", second)):
        # small integers: exact products, and one rounding of the mean
        torch.testing.assert_close(
            moments[name].result(), (seen.T @ seen / len(seen)).double(), rtol=1e-6, atol=0
        )


def test_sharing_that_comes_and_goes_is_refused() -> None:
    model = Branches("same")

    def run(module: nn.Module) -> None:
        module(torch.ones(3, 4))
        module.b(torch.ones(3, 4))

    with pytest.raises(UnsupportedModelError, match="'b' does not read the same tensor as 'a'"):
        observe_moments(model, ["a", "b"], run)
    assert not model.a._forward_pre_hooks  # also after an error


def test_unreached_broken_and_absent_modules_are_named() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("used", "idle", "lazy")})
    with pytest.raises(QuantizationError, match=r"never reached 2 module\(s\): idle, lazy"):
        observe_moments(
            model, list(model), lambda module: module.get_submodule("used")(torch.ones(1, 4))
        )
    # an expert without tokens, say
    with pytest.raises(QuantizationError, match=r"never reached 1 module\(s\): used"):
        observe_moments(
            model, ["used"], lambda module: module.get_submodule("used")(torch.ones(0, 4))
        )
    with pytest.raises(QuantizationError, match="NaN or Inf in the input of used"):
        observe_moments(
            model,
            ["used"],
            lambda module: module.get_submodule("used")(torch.full((1, 4), torch.nan)),
        )
    with pytest.raises(CheckpointError, match="no submodule 'absent'"):
        observe_moments(model, ["absent"], lambda module: None)
