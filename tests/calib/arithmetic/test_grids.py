"""Grids: half a step for every granularity and format, zero points, two levels, and ONNX Runtime's
integers.
"""

from __future__ import annotations

import math

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.arithmetic.grids import (
    dequantize,
    expand,
    expand_grid,
    grid_of,
    quantize,
    round_to_grid,
    weight_grid,
    weight_limits,
)
from calib.arithmetic.scales import convert_to_scale
from calib.errors import QuantizationError
from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    INT8,
    LINEAR_SCHEMES,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerTensor,
    PerToken,
    TensorScheme,
)
from tests.tolerances import half_step

GRANULARITIES = [PerTensor(), PerChannel(0), PerBlock(4), PerBlock(7), PerBlock(10), PerBlock(128)]
WEIGHT_SCHEMES = {name: scheme.weight for name, scheme in LINEAR_SCHEMES.items()}


def random_weight(rows: int = 6, columns: int = 10, seed: int = 0) -> Tensor:
    """Values over four orders of magnitude, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 10.0 ** (
        torch.randn(rows, 1, generator=generator)
    )


def test_limits_are_the_extremes_of_each_group() -> None:
    weight = random_weight(3, 10)
    assert [float(x) for x in weight_limits(weight, PerTensor())] == [
        float(weight.min()),
        float(weight.max()),
    ]
    low, high = weight_limits(weight, PerChannel(0))
    assert low.tolist() == weight.amin(1).tolist()
    assert high.tolist() == weight.amax(1).tolist()
    assert weight_limits(weight, PerChannel(1))[0].tolist() == weight.amin(0).tolist()
    low, high = weight_limits(weight, PerBlock(4))
    assert low.tolist() == [[float(part.min()) for part in row.split(4)] for row in weight]
    assert high.tolist() == [[float(part.max()) for part in row.split(4)] for row in weight]


def test_a_weight_has_no_token() -> None:
    with pytest.raises(QuantizationError, match="a weight has no scale PerToken"):
        weight_limits(random_weight(), PerToken())


@pytest.mark.parametrize(
    ("columns", "size", "blocks"),
    [(704, 128, 6), (704, 64, 11), (128, 128, 1), (48, 128, 1), (129, 128, 2)],
)
def test_blocks_that_do_not_divide_have_a_short_last_one(
    columns: int, size: int, blocks: int
) -> None:
    weight = random_weight(5, columns)
    high = weight_limits(weight, PerBlock(size))[1]
    assert high.shape == (5, blocks)
    expanded = expand(high, weight.shape, PerBlock(size))
    assert expanded.shape == weight.shape
    for column in (0, size - 1, size, columns - 1):
        if column < columns:
            assert torch.equal(expanded[:, column], high[:, column // size])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("fmt", [INT8, INT4], ids=lambda fmt: fmt.name)
def test_dequantized_weights_are_within_half_a_step(
    fmt: NumberFormat, granularity: PerTensor | PerBlock, symmetric: bool
) -> None:
    scheme = TensorScheme(fmt, granularity, symmetric=symmetric)
    weight = random_weight(6, 10)
    grid = weight_grid(weight, scheme)
    stored = quantize(weight, grid, scheme)
    assert stored.dtype == torch.int8
    assert fmt.qmin <= int(stored.min())
    assert int(stored.max()) <= fmt.qmax
    steps = expand_grid(grid, weight.shape, granularity)[0].expand_as(weight)
    error = (dequantize(stored, grid, scheme) - weight).abs()
    # A rounded zero point moves the ends of the range by half a step, so a value there may be a
    # whole one away.
    allowed = half_step(fmt.maxbound) * (1 if symmetric else 2)
    assert bool((error <= steps * allowed).all())
    # the largest value of each group sits at the end of the range: the scale is not needlessly
    # large
    if symmetric:
        low, high = weight_limits(stored.float(), granularity)
        assert bool((torch.maximum(-low, high) == fmt.maxbound).all())


@settings(deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20), st.sampled_from([INT4, INT8])
)
def test_an_asymmetric_grid_holds_zero_and_spans_the_range(
    values: list[float], fmt: NumberFormat
) -> None:
    scheme = TensorScheme(fmt, PerTensor(), symmetric=False)
    weight = torch.tensor([values])
    grid = weight_grid(weight, scheme)
    assert grid.zero_point is not None
    assert float(grid.zero_point) == round(float(grid.zero_point))
    assert fmt.qmin <= float(grid.zero_point) <= fmt.qmax
    zero = torch.zeros(1, 1)
    assert torch.equal(dequantize(quantize(zero, grid, scheme), grid, scheme), zero)
    span = max(0.0, *values) - min(0.0, *values)
    levels = fmt.qmax - fmt.qmin
    tiny = torch.finfo(torch.float32).tiny
    # one rounding to float32
    assert float(grid.scale) == pytest.approx(max(span / levels, tiny), rel=1e-6)


def test_a_zero_point_halves_the_error_of_one_sided_values() -> None:
    weight = torch.rand(8, 256, generator=torch.Generator().manual_seed(0))
    errors = []
    for symmetric in (True, False):
        scheme = TensorScheme(INT4, PerChannel(0), symmetric=symmetric)
        grid = weight_grid(weight, scheme)
        errors.append(
            float(
                (dequantize(quantize(weight, grid, scheme), grid, scheme) - weight).square().mean()
            )
        )
    # 15 steps of 1/15 against 7 of 1/7: the mean squared error falls by (15 / 7)^2 = 4.6
    # 2048 values: the mean is good to 5 %
    assert errors[0] / errors[1] == pytest.approx((15 / 7) ** 2, rel=0.2)


@pytest.mark.parametrize("name", WEIGHT_SCHEMES)
def test_stored_values_are_what_fake_quantization_gives(name: str) -> None:
    scheme = WEIGHT_SCHEMES[name]
    weight = random_weight(6, 96)
    grid = weight_grid(weight, scheme)
    values = dequantize(quantize(weight, grid, scheme), grid, scheme)
    scale, zero = expand_grid(grid, weight.shape, scheme.granularity)
    assert torch.equal(values, round_to_grid(weight, scale, zero, scheme.format))
    # what is on the grid stays
    assert torch.equal(round_to_grid(values, scale, zero, scheme.format), values)


@pytest.mark.parametrize("name", WEIGHT_SCHEMES)
def test_dead_weights_stay_dead(name: str) -> None:
    scheme = WEIGHT_SCHEMES[name]
    weight = torch.zeros(2, 64)
    grid = weight_grid(weight, scheme)
    assert bool((grid.scale > 0).all())
    assert bool(grid.scale.isfinite().all())
    assert not dequantize(quantize(weight, grid, scheme), grid, scheme).any()


def test_nvfp4_has_two_levels_of_scales() -> None:
    scheme = LINEAR_SCHEMES["nvfp4"].weight
    weight = random_weight(4, 64)
    grid = weight_grid(weight, scheme)
    assert grid.second_level is not None
    assert float(grid.second_level) == pytest.approx(
        float(weight.abs().max()) / (6 * 448), rel=1e-6
    )
    assert torch.equal(grid.scale.to(torch.float8_e4m3fn).float(), grid.scale)
    block_amax = weight.abs().reshape(4, 4, 16).amax(-1)
    # E4M3 has three mantissa bits: a rounding moves a scale by at most 2^-4 of itself (subnormal
    # ones by more)
    normal = grid.scale >= 2.0**-6
    effective = grid.scale * grid.second_level * 6
    assert bool(((effective - block_amax).abs() <= block_amax * (2.0**-4 + 1e-6))[normal].all())


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("fmt", [FLOAT4, FLOAT8], ids=lambda fmt: fmt.name)
def test_mx_scales_are_powers_of_two(fmt: NumberFormat, floor: bool) -> None:
    scheme = TensorScheme(fmt, PerBlock(32), scale_format="e8m0-floor" if floor else "e8m0")
    weight = random_weight(64, 64)
    grid = weight_grid(weight, scheme)
    assert bool((torch.frexp(grid.scale)[0] == 0.5).all())
    clipped = weight.abs().reshape(64, 2, 32).amax(-1) > grid.scale * fmt.maxbound
    # only OCP's rule clips, about a quarter of these 128 blocks
    assert bool(clipped.any()) == floor


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["int8", "nvfp4", "mxfp4", "float8"])
def test_limits_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    limit = torch.tensor([1.0, bad])
    with pytest.raises(QuantizationError, match="NaN"):
        grid_of(-limit, limit, WEIGHT_SCHEMES[name])


@settings(deadline=None)
@given(
    st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=20),
    st.floats(2.0**-10, 2, width=32),
)
def test_rounding_is_within_half_a_step_or_saturates(values: list[float], step: float) -> None:
    x, scale = torch.tensor(values), torch.tensor(step)
    y = round_to_grid(x, scale, None, INT8)
    inside = (x <= 127 * scale) & (x >= -128 * scale)
    assert bool(((y - x).abs() <= scale * half_step(128))[inside].all())
    assert bool((y[x > 127 * scale] == 127 * scale).all())
    assert bool((y[x < -128 * scale] == -128 * scale).all())


def qdq_session(output_dtype: int) -> onnxruntime.InferenceSession:
    """A real QuantizeLinear and DequantizeLinear; 3 is ONNX's number for int8, 22 for int4."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> qdq (float[n] x, float s) => (float[n] y) { q ='
        f" QuantizeLinear <output_dtype = {output_dtype}> (x, s) y = DequantizeLinear (q, s) }}"
    )
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize(("fmt", "number"), [(INT8, 3), (INT4, 22)], ids=["int8", "int4"])
def test_rounding_is_onnx_runtimes_to_the_bit(fmt: NumberFormat, number: int) -> None:
    session = qdq_session(number)
    generator = torch.Generator().manual_seed(7)
    differs_from_modelopt = 0
    for amax in (*torch.rand(40, generator=generator).mul(9).tolist(), 127.0, 0.25, 1e-30):
        scale = convert_to_scale(torch.tensor(amax), fmt.maxbound)
        # and their neighbours, and beyond the range
        ties = (torch.arange(fmt.qmin - 2, fmt.qmax + 3) + 0.5) * scale
        x = torch.cat(
            [
                ties,
                torch.nextafter(ties, torch.tensor(torch.inf)),
                torch.nextafter(ties, torch.tensor(-torch.inf)),
                torch.randn(4000, generator=generator) * amax,
                torch.tensor([0.0, -0.0, amax, -amax]),
            ]
        )
        found = session.run(None, {"x": x.numpy(), "s": scale.numpy()})[0]
        ours = round_to_grid(x, scale, None, fmt)
        assert torch.equal(torch.from_numpy(found), ours)
        other = (x * (fmt.maxbound / amax)).round().clamp(fmt.qmin, fmt.qmax) * scale
        differs_from_modelopt += int((other != ours).sum())
    assert differs_from_modelopt > 0  # so the inputs do tell one rounding from another
