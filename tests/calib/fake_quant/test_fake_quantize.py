"""Fake-quantizers: what they round to, what gradients they let through, and their three states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fake_quant_support import Net, batches
from torch import Tensor, nn

from calib.arithmetic.grids import expand_grid, grid_of, round_to_grid, weight_grid
from calib.arithmetic.inputs import fake_quantize_input
from calib.errors import QuantizationError
from calib.fake_quant import (
    FakeQuantState,
    get_default_calib_qconfig,
    get_default_qconfig,
    load_observer_params,
    prepare,
    set_fake_quantize,
)
from calib.fake_quant.qconfig import METHODS
from calib.observers import observer_named
from calib.schemes import (
    FLOAT8,
    INT4,
    INT8,
    PerBlock,
    PerChannel,
    PerCluster,
    PerTensor,
    PerToken,
    TensorScheme,
    scheme_named,
)

symmetric = TensorScheme(INT8, PerTensor())


def quantizer(
    method: str = "fake_quant", scheme: TensorScheme = symmetric, role: Any = "input"
) -> Any:
    return METHODS[method](
        "linear (input)", role, scheme, observer_named("min_max"), torch.Size([])
    )


def calibrated(x: Tensor, **kwargs: Any) -> Any:
    result = quantizer(**kwargs)
    result(x)
    result.state = FakeQuantState.VALIDATION
    return result


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_calibration_changes_no_bit(method: str) -> None:
    model = Net()
    x = batches()[0]
    before = model(x)
    prepare(model, get_default_qconfig(method, method))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_validation_rounds_and_leaves_every_parameter_as_it_is(method: str) -> None:
    model = prepare(Net(), get_default_qconfig(method, method))
    first, second, _ = batches()
    before = model(first)
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    state = state_of(model)
    assert not torch.equal(model(first), before)
    model(second * 100)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_validation_computes_what_the_grids_say() -> None:
    model = prepare(Net(), get_default_qconfig())
    x, other, _ = batches()
    model(x)
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    linear: Any = model.first
    grid = grid_of(x.min(), x.max(), symmetric)
    scheme = TensorScheme(INT8, PerChannel(0))
    steps, _ = expand_grid(
        weight_grid(linear.weight, scheme), linear.weight.shape, scheme.granularity
    )
    weight = round_to_grid(linear.weight, steps, None, INT8)
    expected = round_to_grid(other, grid.scale, None, INT8) @ weight.T + linear.bias
    # The same float32 products of six terms; addmm may add the bias first.
    torch.testing.assert_close(linear(other), expected, rtol=1e-6, atol=1e-6)


def test_qat_observes_and_rounds() -> None:
    x = torch.linspace(-1, 1, 9)
    moving = METHODS["fake_quant"](
        "x", "input", symmetric, observer_named("moving_average:0.5"), torch.Size([])
    )
    moving.state = FakeQuantState.QAT
    grid = grid_of(torch.tensor(-1.0), torch.tensor(1.0), symmetric)
    assert torch.equal(moving(x), round_to_grid(x, grid.scale, None, INT8))
    moving(3 * x)
    assert [float(limit) for limit in moving.limits()] == [-2.0, 2.0]


def test_a_weight_is_observed_anew_each_time() -> None:
    weight = quantizer(role="weight")
    weight(torch.tensor([[4.0, -8.0]]))
    weight(torch.tensor([[1.0, -2.0]]))
    assert [float(limit) for limit in weight.limits()] == [-2.0, 1.0]


@pytest.mark.parametrize("method", METHODS)
def test_rounding_before_calibration_is_refused_by_name(method: str) -> None:
    uncalibrated = quantizer(method)
    uncalibrated.state = FakeQuantState.VALIDATION
    with pytest.raises(QuantizationError, match=r"'linear \(input\)' was never calibrated"):
        uncalibrated(torch.ones(3))
    assert uncalibrated(torch.ones(0, 3)).shape == (0, 3)


def test_what_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(QuantizationError, match=r"'linear \(input\)': .* NaN or Inf"):
        quantizer()(torch.tensor([1.0, torch.inf]))
    for method in METHODS:
        rounding = quantizer(method)
        rounding.state = FakeQuantState.QAT
        with pytest.raises(QuantizationError, match=r"'linear \(input\)': .* NaN or Inf"):
            rounding(torch.tensor([1.0, torch.nan]))


def test_gradients_pass_within_the_range_and_stop_outside() -> None:
    rounding = calibrated(torch.tensor([-2.0, 2.0]))
    x = torch.tensor([-3.0, -2.0, 0.013, 2.0, 3.0], requires_grad=True)
    rounding(x).backward(torch.full((5,), 7.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 7.0, 7.0, 7.0, 0.0]


@pytest.mark.parametrize(
    "scheme",
    [
        TensorScheme(INT8, PerToken(), dynamic=True),
        scheme_named("nvfp4").activation,
        scheme_named("mxfp4").activation,
    ],
)
def test_dynamic_schemes_round_as_the_exported_model_and_pass_every_gradient(
    scheme: TensorScheme,
) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    rounding = calibrated(x, scheme=scheme)
    second = rounding.grid().scale if scheme.needs_calibration else None
    y = rounding(x.requires_grad_())
    assert torch.equal(y, fake_quantize_input(x.detach(), scheme, second))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_bfloat16_stays_bfloat16_and_rounds_in_float32() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = calibrated(x)(x)
    grid = grid_of(x.min(), x.max(), symmetric)
    assert rounded.dtype is torch.bfloat16
    assert torch.equal(rounded, round_to_grid(x.float(), grid.scale, None, INT8).bfloat16())


def test_all_zero_data_gives_a_grid() -> None:
    rounding = calibrated(torch.zeros(4))
    assert torch.equal(rounding(torch.zeros(4)), torch.zeros(4))


def test_lsq_gradients_are_those_of_the_paper() -> None:
    rounding = quantizer("lsq", TensorScheme(INT4, PerTensor()))
    rounding.set_limits(torch.tensor(-0.7), torch.tensor(0.7))  # step 0.1
    rounding.state = FakeQuantState.QAT
    x = torch.tensor([0.123, -0.36, 5.0, -5.0], requires_grad=True)
    rounding(x).sum().backward()
    v = x.detach() / 0.1
    slope = torch.tensor([1 - v[0], -4 - v[1], 7.0, -8.0])
    expected = slope.sum() / (4 * 7) ** 0.5
    # float32 sums of four terms
    torch.testing.assert_close(rounding.learned.grad, expected, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_lsq_scales_the_gradient_by_the_features_of_a_token_whatever_the_batch() -> None:
    gradients = []
    for count in (1, 10):
        rounding = quantizer("lsq", TensorScheme(INT4, PerTensor()))
        rounding.set_limits(torch.tensor(-0.7), torch.tensor(0.7))
        rounding.state = FakeQuantState.QAT
        rounding(torch.tensor([0.123, -0.36, 5.0, -5.0]).repeat(count, 1)).sum(-1).mean().backward()
        gradients.append(rounding.learned.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_lsq_starts_from_the_first_batch_and_then_ignores_what_it_sees() -> None:
    rounding = quantizer("lsq")
    rounding.state = FakeQuantState.QAT
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    rounding(x)
    start = 2 * x.abs().mean() / 127**0.5
    torch.testing.assert_close(rounding.learned.detach(), start)
    rounding(1000 * x)
    torch.testing.assert_close(rounding.learned.detach(), start)
    low, high = rounding.limits()
    assert grid_of(low, high, symmetric).scale == rounding.learned


def test_lsq_survives_a_step_that_training_made_negative_or_zero() -> None:
    rounding = calibrated(torch.tensor([1.0, -1.0]), method="lsq")
    x = torch.linspace(-1, 1, 5)
    expected = rounding(x)
    with torch.no_grad():
        rounding.learned.neg_()
    assert torch.equal(rounding(x), expected)
    with torch.no_grad():
        rounding.learned.zero_()
    assert bool(torch.isfinite(rounding(x)).all())


@pytest.mark.parametrize(("without_zero_point", "expected"), [(True, 1.0), (False, 2.0)])
def test_pact_gives_clipped_values_to_its_threshold(
    without_zero_point: bool, expected: float
) -> None:
    rounding = quantizer("pact", TensorScheme(INT8, PerTensor(), symmetric=without_zero_point))
    rounding.set_limits(torch.tensor(0.0), torch.tensor(1.5))
    rounding.state = FakeQuantState.QAT
    x = torch.tensor([-2.0, 0.5, 1.5, 4.0], requires_grad=True)
    y = rounding(x)
    lowest = -1.5 if without_zero_point else 0.0
    torch.testing.assert_close(
        y.detach(), torch.tensor([lowest, 0.5, 1.5, 1.5]), rtol=0, atol=1.5 / 127 / 2
    )
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert float(rounding.learned.grad) == expected


def test_learned_ranges_refuse_what_they_cannot_learn() -> None:
    for method in ("lsq", "pact"):
        with pytest.raises(QuantizationError, match=f"'{method}' cannot learn the range of linear"):
            quantizer(method, TensorScheme(FLOAT8, PerTensor()))
        with pytest.raises(QuantizationError, match=f"'{method}' cannot learn the range of linear"):
            quantizer(method, TensorScheme(INT8, PerCluster(2)))
    with pytest.raises(QuantizationError, match="no zero point"):
        quantizer("lsq", TensorScheme(INT8, PerTensor(), symmetric=False))
    with pytest.raises(QuantizationError, match="clips at zero"):
        quantizer("pact", TensorScheme(INT8, PerTensor(), symmetric=False))(
            torch.tensor([-1.0, 1.0])
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(4)])
def test_training_lowers_the_loss_and_moves_weights_and_ranges(
    method: str, granularity: Any
) -> None:
    weights = {"format": "int4", "granularity": granularity}
    model = prepare(Net(), get_default_qconfig(method, method, weight_qkwargs=weights))
    x = torch.cat(batches(8))
    target = torch.stack([x[:, 0] - x[:, 1], x[:, 2].abs(), x[:, 3] * 0.5], dim=1)
    model(x)
    set_fake_quantize(model, FakeQuantState.QAT)
    before = state_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    learned = "learned" if method != "fake_quant" else "weight_fake_quant.high"
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {"first.weight", "second.weight"} <= moved
    assert any(learned in name for name in moved)


def test_calibrate_validate_load_train_validate() -> None:
    """The flow of Horizon's "Calibration v2", steps 1 to 11."""
    x = torch.cat(batches(8))
    target = x[:, :3] * 2 - x[:, 3:]
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (network(x) - target).square().mean().backward()
            optimizer.step()

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(x) - target).square().mean())

    train(model, optimizer, 200)
    four_bits = {"format": "int4"}
    calibration = prepare(
        copy.deepcopy(model),
        get_default_qconfig(
            activation_observer="percentile", activation_qkwargs=four_bits, weight_qkwargs=four_bits
        ),
    )
    set_fake_quantize(calibration, FakeQuantState.CALIBRATION)
    assert loss(calibration) == loss(model)
    set_fake_quantize(calibration, FakeQuantState.VALIDATION)
    after_calibration = loss(calibration)
    qconfig = get_default_qconfig(
        activation_observer="moving_average:0.99",
        activation_qkwargs=four_bits,
        weight_qkwargs=four_bits,
    )
    qat = prepare(copy.deepcopy(model), qconfig)
    assert load_observer_params(calibration, qat) == []
    set_fake_quantize(qat, FakeQuantState.VALIDATION)
    assert loss(qat) == after_calibration
    set_fake_quantize(qat, FakeQuantState.QAT)
    train(qat, torch.optim.Adam(qat.parameters(), lr=0.003), 100)
    set_fake_quantize(qat, FakeQuantState.VALIDATION)
    assert loss(model) < loss(qat) < 0.8 * after_calibration


def test_an_input_by_clusters_has_a_scale_for_each_channel() -> None:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    x[:, 2] *= 100
    model: Any = prepare(
        Net(), get_default_qconfig(activation_qkwargs={"granularity": PerCluster(2)}), ["first"]
    )
    model(x)
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    low, high = model.first.input_fake_quant.limits()
    assert high.shape == (6,)
    scheme = TensorScheme(INT8, PerCluster(2))
    expected = fake_quantize_input(x, scheme, grid_of(low, high, scheme).scale)
    assert torch.equal(model.first.input_fake_quant(x), expected)
    assert float(high[2]) > 10 * float(high[0])


def test_the_calibration_default_takes_a_percentile() -> None:
    qconfig = get_default_calib_qconfig()
    assert qconfig.activation is not None
    assert qconfig.activation.observer == "percentile"
    model: Any = prepare(Net(), qconfig)
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 1000.0
    model(x)
    assert float(model.first.input_fake_quant.limits()[1]) < 10
