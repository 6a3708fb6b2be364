"""What quantized linears do to their inputs: each granularity against arithmetic written out row by
row.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calib.arithmetic.grids import round_to_grid
from calib.arithmetic.inputs import fake_quantize_input, input_grid
from calib.arithmetic.rounding import round_e4m3_scale
from calib.errors import QuantizationError
from calib.schemes import (
    FLOAT8,
    INT4,
    INT8,
    SCHEMES,
    PerBlock,
    PerChannel,
    PerCluster,
    PerTensor,
    PerToken,
    TensorScheme,
)


def activations(seed: int = 0) -> Tensor:
    """Tokens of very different size, one of them all zero, with an offset so that a zero point
    matters.
    """
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 5, 64, generator=generator) + 0.7) * 10.0 ** torch.randn(
        2, 5, 1, generator=generator
    )
    x[1, 2] = 0.0
    return x


@pytest.mark.parametrize("fmt", [INT4, INT8, FLOAT8], ids=lambda fmt: fmt.name)
def test_a_symmetric_token_has_the_scale_of_its_amax(fmt: object) -> None:
    x = activations()
    scheme = TensorScheme(fmt, PerToken(), dynamic=True)  # type: ignore[arg-type]
    found = fake_quantize_input(x, scheme)
    for row, quantized in zip(x.reshape(-1, 64), found.reshape(-1, 64), strict=True):
        static = TensorScheme(scheme.format, PerTensor())
        grid = input_grid(row.amin(), row.amax(), static, torch.float32)
        assert torch.equal(quantized, fake_quantize_input(row, static, grid.scale))


@pytest.mark.parametrize("fmt", [INT4, INT8], ids=lambda fmt: fmt.name)
def test_an_asymmetric_token_uses_all_levels(fmt: object) -> None:
    x = activations()
    scheme = TensorScheme(fmt, PerToken(), symmetric=False, dynamic=True)  # type: ignore[arg-type]
    found = fake_quantize_input(x, scheme)
    levels = scheme.format.qmax - scheme.format.qmin
    span = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
    # half a step of rounding and half a step by which the rounded zero point moves the ends;
    # float32 adds its own eps
    assert bool(((found - x).abs() <= span / levels * (1 + 1e-5)).all())
    assert not found[1, 2].any()


def test_a_zero_point_pays_for_one_sided_tokens() -> None:
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(0))
    symmetric, asymmetric = (
        (fake_quantize_input(x, TensorScheme(INT4, PerToken(), symmetric=flag, dynamic=True)) - x)
        .square()
        .mean()
        for flag in (True, False)
    )
    # 8192 values: good to some per cent
    assert float(symmetric / asymmetric) == pytest.approx((15 / 7) ** 2, rel=0.1)


def test_a_cluster_has_its_own_static_scale() -> None:
    x = activations()
    scale = torch.tensor([0.01, 1.0]).repeat_interleave(32)
    found = fake_quantize_input(x, TensorScheme(INT8, PerCluster(2)), scale)
    expected = torch.clamp(torch.round(x / scale), -128, 127) * scale
    assert torch.equal(found, expected)


def test_static_zero_points_shift_the_codes() -> None:
    x = activations()
    scheme = TensorScheme(INT8, PerTensor(), symmetric=False)
    grid = input_grid(torch.tensor(-1.0), torch.tensor(3.0), scheme, torch.float32)
    assert grid.zero_point is not None
    found = fake_quantize_input(x, scheme, grid.scale, grid.zero_point)
    codes = torch.clamp(torch.round(x / grid.scale) + grid.zero_point, -128, 127)
    assert torch.equal(found, (codes - grid.zero_point) * grid.scale)
    assert float(found.min()) >= -1.02
    assert float(found.max()) <= 3.02  # one step of 4/255 and the rounded zero point


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_blocks_do_not_see_each_other(name: str) -> None:
    scheme = SCHEMES[name].activation
    assert scheme is not None
    assert isinstance(scheme.granularity, PerBlock)
    size = scheme.granularity.size
    x = activations()
    second = (
        input_grid(x.amin(), x.amax(), scheme, torch.float32).scale
        if scheme.scale_format == "e4m3"
        else None
    )
    found = fake_quantize_input(x, scheme, second)
    alone = [
        fake_quantize_input(part.contiguous(), scheme, second) for part in x.split(size, dim=-1)
    ]
    assert torch.equal(found, torch.cat(alone, dim=-1))


def test_nvfp4_takes_its_second_level_from_calibration() -> None:
    scheme = SCHEMES["nvfp4"].activation
    assert scheme is not None
    amax = torch.tensor(12.0)
    assert float(input_grid(-amax, amax, scheme, torch.float16).scale) == pytest.approx(
        12 / (6 * 448), rel=1e-6
    )
    with pytest.raises(QuantizationError, match="needs a calibrated scale"):
        fake_quantize_input(activations(), scheme)


def test_nvfp4_uses_the_second_level_that_is_stored_to_the_bit() -> None:
    scheme = SCHEMES["nvfp4"].activation
    assert scheme is not None
    x = torch.linspace(-1, 1, 16)
    # One in six float32 numbers does not survive a product with 6 * 448 and a division by it.
    for second in torch.rand(64, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1e-4:
        step = round_e4m3_scale(x.abs().amax() / 6 / second) * second
        expected = round_to_grid(x, step, None, scheme.format)
        assert torch.equal(fake_quantize_input(x[None], scheme, second)[0], expected)


@pytest.mark.parametrize("granularity", [PerChannel(0), PerBlock(16)], ids=str)
def test_a_static_input_has_no_such_granularity(granularity: object) -> None:
    scheme = TensorScheme(INT8, granularity)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="activations cannot be quantized by"):
        fake_quantize_input(activations(), scheme, torch.tensor(1.0))
