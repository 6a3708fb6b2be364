"""Objectives: their values, their gradients, and the quantizer they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.errors import RotationError
from calib.rotations.objectives import ObjectiveName, make_objective, over_heads, whole_inputs
from calib.rotations.quantizer import ActivationScheme, fake_quantize, scheme_error

SCHEMES = [
    ActivationScheme(bits, symmetric, granularity, group_size=5)
    for bits in (4, 8)
    for symmetric in (True, False)
    for granularity in ("tensor", "token", "group")
]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_whip_is_the_published_formula() -> None:
    y = tokens(7, 5)
    expected = sum(torch.exp(-y[t].abs()).sum() for t in range(7)) / 7
    torch.testing.assert_close(make_objective("whip")(y), expected)


@pytest.mark.parametrize("name", ["whip", "lp", "kurtosis", "range"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_the_derivative_of_the_loss(name: ObjectiveName, weighted: bool) -> None:
    y = tokens(2, 6, 5, seed=3)
    weights = (
        torch.tensor([[1.0, 2.0, 1.0, 0.5, 3.0, 1.0]] * 2, dtype=torch.float64)
        if weighted
        else None
    )
    objective = make_objective(name, scheme=ActivationScheme(4, symmetric=False))
    if name == "range":  # its power is held fixed: a rotation does not change it
        y = y / y.square().mean(-1, keepdim=True).sqrt()
    loss, gradient = objective.loss_and_gradient(y, weights)
    torch.testing.assert_close(loss, objective(y, weights))
    direction = tokens(2, 6, 5, seed=4)
    if name == "range":
        direction = direction - (direction * y).mean(-1, keepdim=True) * y
    h = 1e-6
    difference = (objective(y + h * direction, weights) - objective(y - h * direction, weights)) / (
        2 * h
    )
    # Central differences: h^2 of truncation and 1e-16 / h of rounding.
    torch.testing.assert_close(
        (gradient * direction).sum((-1, -2)) / 6, difference, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_going_down_the_straight_through_gradient_lowers_the_error(
    scheme: ActivationScheme,
) -> None:
    y = tokens(512, 12, seed=5)
    y[:, 0] *= 10  # one wide channel sets every scale
    _, gradient = make_objective("scheme", scheme=scheme).loss_and_gradient(y)
    before = (fake_quantize(y, scheme) - y).square().sum()
    # 5 % of the size of y: many codes change, so the jumps that the estimate ignores average out.
    moved = y - gradient * (0.05 * y.norm() / gradient.norm())
    assert (fake_quantize(moved, scheme) - moved).square().sum() < before


def test_the_scheme_loss_is_the_scheme_error_of_tokens_of_equal_power() -> None:
    y = tokens(40, 16)
    y = y / y.norm(dim=-1, keepdim=True)
    for scheme in SCHEMES:
        torch.testing.assert_close(
            make_objective("scheme", scheme=scheme)(y), scheme_error(y, scheme)
        )


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=24),
    st.sampled_from(SCHEMES),
)
def test_rounding_moves_an_entry_by_at_most_half_a_step(
    values: list[float], scheme: ActivationScheme
) -> None:
    x = torch.tensor(values, dtype=torch.float64)[None]
    quantized = fake_quantize(x, scheme)
    span = x.abs().max() / (2 ** (scheme.bits - 1) - 1)
    if not scheme.symmetric:
        span = (x.max().clamp_min(0) - x.min().clamp_max(0)) / (2**scheme.bits - 1)
    # Asymmetric: rounding the zero point may push an end out of range by half a step more.
    reach = (0.5 if scheme.symmetric else 1.0) * span * (1 + 1e-9) + 1e-300
    assert ((quantized - x).abs() <= reach).all()
    assert (quantized[x == 0] == 0).all()  # zero, and so padding, is exact


def test_codes_use_the_documented_range() -> None:
    x = torch.linspace(-1, 1, 4001, dtype=torch.float64)[None]
    for bits in (4, 8):
        codes = fake_quantize(x, ActivationScheme(bits)) * (2 ** (bits - 1) - 1)
        assert codes.min() == -(2 ** (bits - 1) - 1)
        assert codes.max() == 2 ** (bits - 1) - 1
        # amax / qmax leaves the most negative code unused
        assert len(set(codes.flatten().tolist())) == 2**bits - 1
        levels = set(fake_quantize(x, ActivationScheme(bits, symmetric=False)).flatten().tolist())
        assert len(levels) == 2**bits


def test_static_limits_clamp() -> None:
    x = torch.tensor([[-4.0, 1.0, 2.0]])
    limits = (torch.tensor(-2.0), torch.tensor(2.0))
    scheme = ActivationScheme(8, granularity="tensor")
    quantized = fake_quantize(x, scheme, limits=limits)
    assert quantized[0, 0] == pytest.approx(-2.0 * 128 / 127)
    assert float(scheme_error(x, scheme, limits=limits)) > 0.1


def test_weights_act_as_repetitions() -> None:
    x = tokens(3, 8)
    weights = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    repeated = x.repeat_interleave(torch.tensor([1, 3, 2]), dim=0)
    for scheme in SCHEMES:
        torch.testing.assert_close(
            scheme_error(x, scheme, weights=weights), scheme_error(repeated, scheme)
        )
    for name in ("whip", "lp", "kurtosis"):
        objective = make_objective(name)
        torch.testing.assert_close(objective(x, weights), objective(repeated))


def test_errors_are_per_batch_element_and_zero_for_zero_activations() -> None:
    x = tokens(2, 3, 6, 8)
    x[1, 2] = 0
    error = scheme_error(x, ActivationScheme(4))
    assert error.shape == (2, 3)
    assert error[1, 2] == 0
    torch.testing.assert_close(error[0, 1], scheme_error(x[0, 1], ActivationScheme(4)))


def test_auto_follows_the_scheme() -> None:
    assert make_objective("auto").name == "whip"
    assert make_objective("auto", scheme=ActivationScheme(4)).name == "lp"
    assert (
        make_objective(
            "auto", scheme=ActivationScheme(8, symmetric=False, granularity="tensor")
        ).name
        == "lp"
    )
    assert make_objective("auto", scheme=ActivationScheme(4, symmetric=False)).name == "lp"
    y = tokens(5, 8)
    torch.testing.assert_close(
        make_objective("auto", scheme=ActivationScheme(4), p=8.0)(y), make_objective("lp")(y)
    )


def test_bad_input_is_refused_with_a_hint() -> None:
    for call in (
        lambda: ActivationScheme(1),
        lambda: ActivationScheme(4, granularity="row"),  # type: ignore[arg-type]
        lambda: ActivationScheme(4, group_size=0),
        lambda: make_objective("hinge"),  # type: ignore[arg-type]
        lambda: make_objective("scheme"),
        lambda: make_objective("lp", p=1.0),
    ):
        with pytest.raises(RotationError) as error:
            call()
        assert error.value.hint


def test_whole_inputs_are_what_the_output_projection_reads() -> None:
    """Query head ``h`` uses KV head ``h // group``; heads are stored one after the other."""
    x = tokens(2, 5, 3, 2, 4, seed=6)  # [layers, tokens, kv_heads, group, n]
    by_kv_head = x.permute(0, 2, 1, 3, 4).reshape(2, 3, 10, 4)
    assert torch.equal(whole_inputs(by_kv_head, 2), x.reshape(2, 5, 24))


@pytest.mark.parametrize("name", ["whip", "lp", "kurtosis", "range", "scheme"])
def test_heads_share_the_quantizer_of_their_token(name: ObjectiveName) -> None:
    """The sum over heads is the loss of whole tokens, and so is its gradient, with a token's weight
    for each entry.
    """
    kv, group = 3, 2
    y = tokens(2, kv, 10, 4, seed=7)
    weights = torch.linspace(1, 2, 5, dtype=torch.float64)
    objective = make_objective(name, scheme=ActivationScheme(4, symmetric=False), p=2.0)
    loss, gradient = over_heads(objective, kv, group).loss_and_gradient(
        y, weights.repeat_interleave(group).expand(2, kv, 10)
    )
    assert loss.shape == (2, kv)
    whole, wanted = objective.loss_and_gradient(whole_inputs(y, group), weights.expand(2, 5))
    # sums over entries: heads are independent, and each has a loss of its own
    if name in ("whip", "lp"):
        entries = objective.per_token(whole_inputs(y, group)).sum()
        torch.testing.assert_close(objective.per_token(y).sum(), entries)
        return
    torch.testing.assert_close(loss.sum(-1), whole)
    torch.testing.assert_close(loss, loss[..., :1].expand(2, kv))
    # Gradients are times the number of tokens, which are entries here.
    torch.testing.assert_close(whole_inputs(gradient, group), wanted * group)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", ["whip", "lp", "kurtosis", "range", "scheme"])
def test_a_closed_form_is_the_derivative_that_autograd_finds(
    name: ObjectiveName, scheme: ActivationScheme
) -> None:
    kv, group = 3, 2
    y = tokens(2 * kv, 8, 6, seed=8)
    for p in (4.0, 3.0) if name == "lp" else (4.0,):
        objective = over_heads(make_objective(name, scheme=scheme, p=p), kv, group)
        if objective.closed_form is None:
            assert objective.whole
            continue
        leaf = y.clone().requires_grad_()
        losses = objective.per_token(leaf)
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
        # the same sums of some dozen float64 terms in another order
        found = objective.closed_form(y.clone())
        torch.testing.assert_close(found, (losses.detach(), slope), rtol=1e-11, atol=1e-12)
