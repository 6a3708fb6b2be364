"""The formulas, the error that a search minimises, and ModelOpt's scales for single linears as a
yardstick.
"""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from calib.errors import QuantizationError
from calib.schemes import INT4, INT8, LinearScheme, PerBlock, PerChannel, PerTensor, TensorScheme
from calib.smoothing.scales import (
    Chosen,
    awq_scales,
    column_amax,
    column_share,
    smoothquant_scales,
    smoothquant_search,
)

INPUTS, OUTPUTS, TOKENS = 96, 24, 200
SCHEMES = {
    "int8": TensorScheme(INT8, PerChannel(0)),
    "int4": TensorScheme(INT4, PerChannel(0)),
    "int4 blocks": TensorScheme(INT4, PerBlock(32)),
}


def data(seed: int, readers: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Inputs with large channels and a mean, and weights with columns of different size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = (normal(TOKENS, INPUTS) + normal(INPUTS)) * normal(INPUTS).exp()
    return x, [normal(OUTPUTS, INPUTS) * (0.5 * normal(INPUTS)).exp() for _ in range(readers)]


def awq(x: Tensor, weights: list[Tensor], scheme: TensorScheme, grid: int = 20) -> Chosen:
    schemes = [LinearScheme(scheme, None)] * len(weights)
    share = column_share(weights, schemes)
    return awq_scales(x.abs().mean(dim=0), share, moment(x), weights, schemes, grid=grid)


def moment(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def modelopt(
    x: Tensor, weight: Tensor, cfg: dict[str, Any], algorithm: dict[str, Any]
) -> tuple[nn.Module, Tensor]:
    """One linear calibrated by ModelOpt, and the scale that divides its input."""
    linear = nn.Linear(INPUTS, len(weight), bias=False)
    linear.weight.data = weight.clone()
    entries = [{"quantizer_name": "*", "enable": False}]
    entries += [
        {"quantizer_name": f"0.{kind}_quantizer", "cfg": cfg[kind], "enable": True} for kind in cfg
    ]
    with torch.no_grad():
        model = mtq.quantize(
            nn.Sequential(linear),
            {"quant_cfg": entries, "algorithm": algorithm},
            lambda model: model(x),
        )
    quantizer: Any = model[0].input_quantizer
    return model, 1 / quantizer.pre_quant_scale.flatten().double()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_is_modelopts_formula_for_one_linear(alpha: float) -> None:
    x, (weight,) = data(0)
    cfg = {"weight": {"num_bits": 8, "axis": 0}, "input": {"num_bits": 8, "axis": None}}
    _, theirs = modelopt(x, weight, cfg, {"method": "smoothquant", "alpha": alpha})
    ours = smoothquant_scales(x.abs().amax(dim=0), column_amax([weight]), alpha)
    # Theirs takes powers and a quotient in float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_awq_of_one_linear_is_no_worse_than_modelopts(name: str, seed: int) -> None:
    scheme = SCHEMES[name]
    x, (weight,) = data(seed)
    blocks = scheme.granularity.size if isinstance(scheme.granularity, PerBlock) else None
    grouping: dict[str, Any] = {"axis": 0} if blocks is None else {"block_sizes": {-1: blocks}}
    cfg = {"weight": {"num_bits": scheme.format.bits, **grouping}}
    model, _ = modelopt(x, weight, cfg, {"method": "awq_lite", "alpha_step": 0.1})
    with torch.no_grad():
        theirs = float((model(x) - x @ weight.T).double().square().sum(dim=1).mean())
    chosen = awq(x, [weight], scheme)
    # Our grid holds theirs, so ours is at most equal, but for integers that float32 rounds the
    # other way.
    assert chosen.errors[chosen.setting] <= theirs * (1 + 1e-3)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_error_is_that_of_the_outputs(name: str) -> None:
    scheme = SCHEMES[name]
    x, weights = data(1, readers=2)
    chosen = awq(x, weights, scheme)
    for s, expected in (
        (chosen.scales, chosen.errors[chosen.setting]),
        (torch.ones(INPUTS), chosen.errors[None]),
    ):
        measured = 0.0
        for weight in weights:
            smoothed = (weight.double() * s).float()
            size = scheme.granularity.size if isinstance(scheme.granularity, PerBlock) else INPUTS
            blocks = smoothed.reshape(OUTPUTS, -1, size)
            step = blocks.abs().amax(dim=-1, keepdim=True) / scheme.format.maxbound
            rounded = ((blocks / step).round() * step).reshape(weight.shape)
            outputs = (x.double() / s) @ rounded.double().T - x.double() @ weight.double().T
            measured += float(outputs.square().sum(dim=1).mean())
        assert expected == pytest.approx(measured, rel=1e-4)  # float32 products


def test_the_scale_is_chosen_for_all_readers_together() -> None:
    """The sum of both errors is least, though each reader by itself would take another scale."""
    x, weights = data(2, readers=2)
    weights[1] = weights[1] * torch.linspace(0.05, 20, INPUTS)
    scheme = SCHEMES["int4"]
    together = awq(x, weights, scheme)
    alone = [awq(x, [weight], scheme) for weight in weights]
    assert together.errors[None] == pytest.approx(sum(one.errors[None] for one in alone), rel=1e-9)
    assert together.errors[together.setting] == min(together.errors.values())
    assert together.errors[together.setting] < together.errors[None]
    assert len({one.setting for one in alone} | {together.setting}) > 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), name=st.sampled_from(list(SCHEMES)), grid=st.integers(1, 20))
def test_awq_is_never_worse_than_nothing(seed: int, name: str, grid: int) -> None:
    x, weights = data(seed, readers=2)
    chosen = awq(x, weights, SCHEMES[name], grid)
    assert len(chosen.errors) == grid + 2
    assert chosen.error_ratio is not None
    assert chosen.error_ratio <= 1
    # Normalised; but for rounding of the root and the quotients.
    assert float(chosen.scales.max() * chosen.scales.min()) == pytest.approx(1, rel=1e-9)


def test_nothing_to_gain_is_left_alone() -> None:
    """Weights that are on the grid already have no error, and any scale would add one."""
    weight = torch.randint(
        -7, 8, (OUTPUTS, INPUTS), generator=torch.Generator().manual_seed(0)
    ).float()
    weight[:, 0] = 7
    x, _ = data(0)
    chosen = awq(x, [weight], SCHEMES["int4"])
    assert chosen.setting is None
    assert torch.equal(chosen.scales, torch.ones(INPUTS, dtype=torch.float64))


def test_dead_channels_keep_a_scale_of_one() -> None:
    x, (weight,) = data(0)
    x[:, 3] = 0
    weight[:, 5] = 0
    dead = torch.tensor([3, 5])
    for alpha in (0.0, 0.5, 1.0):
        s = smoothquant_scales(x.abs().amax(dim=0), column_amax([weight]), alpha)
        assert torch.equal(s[dead], torch.ones(2, dtype=torch.float64))
    assert torch.equal(
        awq(x, [weight], SCHEMES["int4"]).scales[dead], torch.ones(2, dtype=torch.float64)
    )
    assert torch.equal(
        awq(0 * x, [weight], SCHEMES["int4"]).scales, torch.ones(INPUTS, dtype=torch.float64)
    )


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.lists(st.floats(0, 1e30), min_size=2, max_size=2))
def test_smoothquant_scales_are_positive_and_bounded(alpha: float, amax: list[float]) -> None:
    s = smoothquant_scales(torch.tensor(amax, dtype=torch.float64), torch.tensor(amax[::-1]), alpha)
    assert bool(((s >= 1e-4) & (s <= 1e4)).all())


def test_alpha_is_searched_for_weights_and_inputs_together() -> None:
    x, (weight,) = data(0)
    scheme = LinearScheme(SCHEMES["int8"], TensorScheme(INT8, PerTensor()))
    amax = x.abs().amax(dim=0)
    chosen = smoothquant_search(amax, column_amax([weight]), moment(x), [weight], [scheme])
    measured = {
        s: outputs_error(x, weight, scales(amax, weight, s)) for s in (None, 0.5, chosen.setting)
    }
    assert chosen.setting is not None
    # Rounding errors of inputs are taken as uniform and independent; these inputs are so within a
    # few per cent.
    for setting, error in measured.items():
        assert chosen.errors[setting] == pytest.approx(error, rel=0.1)
    assert measured[chosen.setting] < 0.5 * measured[None]


def scales(amax: Tensor, weight: Tensor, alpha: float | None) -> Tensor:
    return (
        torch.ones(INPUTS)
        if alpha is None
        else smoothquant_scales(amax, column_amax([weight]), alpha)
    )


def outputs_error(x: Tensor, weight: Tensor, s: Tensor) -> float:
    """Of static int8 inputs and int8 weights, measured."""
    inputs, smoothed = x.double() / s, weight.double() * s
    steps = inputs.abs().max() / 127, smoothed.abs().amax(dim=1, keepdim=True) / 127
    rounded = [
        (values / step).round() * step
        for values, step in zip((inputs, smoothed), steps, strict=True)
    ]
    return float(
        (rounded[0] @ rounded[1].T - x.double() @ weight.double().T).square().sum(dim=1).mean()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(value: float) -> None:
    x, (weight,) = data(0)
    x[0, 0] = value
    with pytest.raises(QuantizationError, match="amax of the inputs holds NaN or Inf"):
        smoothquant_scales(x.abs().amax(dim=0), column_amax([weight]))
    with pytest.raises(QuantizationError, match="mean magnitude of the inputs holds NaN or Inf"):
        awq(x, [weight], SCHEMES["int4"])
