"""Scales: the identities that define them, what they refuse, and integers that ONNX Runtime agrees on to the bit."""

from __future__ import annotations

import math

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.errors import QuantizationError
from calib.scales import (
    compute_scale,
    convert_to_scale,
    dequantize,
    expand_scale,
    fake_quantize,
    quantize,
    weight_amax,
)
from calib.schemes import FLOAT8, FORMATS, INT4, INT8, NumberFormat, PerBlock, PerChannel, PerTensor, TensorScheme
from tests.tolerances import half_step, rounded_once

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
GRANULARITIES = [PerTensor(), PerChannel(0), PerBlock(4), PerBlock(7), PerBlock(10), PerBlock(128)]


def random_weight(rows: int = 6, columns: int = 10, seed: int = 0) -> Tensor:
    """Values over four orders of magnitude, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 10.0 ** (torch.randn(rows, 1, generator=generator))


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-2, 6e4), min_size=1, max_size=8), st.sampled_from(DTYPES), st.sampled_from(sorted(FORMATS))
)
def test_scale_times_maxbound_is_amax(values: list[float], dtype: torch.dtype, fmt: str) -> None:
    amax = torch.tensor(values, dtype=torch.float64)
    maxbound = FORMATS[fmt].maxbound
    scale = convert_to_scale(amax, maxbound, dtype=dtype)
    assert scale.dtype == dtype
    assert scale.shape == amax.squeeze().shape
    normal = amax.squeeze() / maxbound >= torch.finfo(dtype).tiny
    back = scale.double() * maxbound
    assert bool(((back - amax.squeeze()).abs() <= rounded_once(dtype) * amax.squeeze())[normal].all())
    assert bool((scale > 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amax", [0.0, 1e-300])
def test_a_dead_channel_gets_the_smallest_normal_number(amax: float, dtype: torch.dtype) -> None:
    scale = convert_to_scale(torch.tensor([amax, 1.0], dtype=torch.float64), 127, dtype=dtype)
    assert float(scale[0]) == torch.finfo(dtype).tiny
    assert float(scale[1]) > torch.finfo(dtype).tiny
    weight = torch.zeros(1, 4)
    stored = quantize(weight, scale[:1].float(), TensorScheme(INT8, PerChannel(0)))
    assert torch.equal(stored, torch.zeros(1, 4, dtype=torch.int8))


def test_a_range_that_underflows_float16_keeps_a_positive_scale() -> None:
    """1e-6 / 127 is 8e-9, which float16 rounds to zero; float32 has no trouble with it."""
    amax = torch.tensor(1e-6)
    assert float((amax / 127).half()) == 0
    assert float(convert_to_scale(amax, 127, dtype=torch.float16)) == torch.finfo(torch.float16).tiny
    assert float(convert_to_scale(amax, 127)) == pytest.approx(1e-6 / 127, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_broken_statistics_are_refused(bad: float) -> None:
    with pytest.raises(QuantizationError, match="NaN, Inf or a negative"):
        convert_to_scale(torch.tensor([1.0, bad]), 127)


def test_an_overflowing_scale_is_refused_with_its_amax() -> None:
    with pytest.raises(QuantizationError, match=r"overflows torch.float16: the largest amax is 1e\+08"):
        convert_to_scale(torch.tensor([1.0, 1e8]), 7, dtype=torch.float16)


@pytest.mark.parametrize("maxbound", [0.0, -127.0, math.nan])
def test_a_maxbound_that_is_not_positive_is_refused(maxbound: float) -> None:
    with pytest.raises(QuantizationError, match="maxbound must be positive"):
        convert_to_scale(torch.ones(1), maxbound)


@given(st.floats(1e-3, 1e4))
def test_the_two_conventions_differ_by_127_5_over_127(amax: float) -> None:
    data = torch.tensor([-amax, amax / 2], dtype=torch.float64)
    qat = compute_scale(data, -128, 127)
    symmetric = convert_to_scale(data.abs().max(), 127, dtype=torch.float64)
    assert float(qat) == pytest.approx(amax / 127.5, rel=1e-12)
    assert float(symmetric / qat) == pytest.approx(127.5 / 127, rel=1e-12)
    # over the narrow range they are the same
    assert float(compute_scale(data, -127, 127)) == pytest.approx(float(symmetric), rel=1e-12)


def test_compute_scale_keeps_the_dtype_and_survives_zeros() -> None:
    scale = compute_scale(torch.zeros(3, dtype=torch.float16), -128, 127)
    assert scale.dtype == torch.float16
    assert scale.shape == ()
    assert float(scale) == torch.finfo(torch.float16).tiny


@pytest.mark.parametrize(
    ("data", "low", "high", "message"),
    [
        (torch.ones(2), 3, 3, "quant_max .3. must be above"),
        (torch.ones(2), 127, -128, "must be above"),
        (torch.ones(0), -128, 127, "empty"),
        (torch.tensor([math.nan]), -128, 127, "NaN"),
    ],
)
def test_compute_scale_refuses(data: Tensor, low: float, high: float, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        compute_scale(data, low, high)


def test_weight_amax_is_the_abs_max_of_each_group() -> None:
    weight = random_weight(3, 10)
    assert weight_amax(weight, PerTensor()).shape == ()
    assert float(weight_amax(weight, PerTensor())) == float(weight.abs().max())
    assert weight_amax(weight, PerChannel(0)).tolist() == [float(row.abs().max()) for row in weight]
    assert weight_amax(weight, PerChannel(1)).tolist() == [float(column.abs().max()) for column in weight.T]
    blocked = weight_amax(weight, PerBlock(4))
    assert blocked.tolist() == [[float(part.abs().max()) for part in row.split(4)] for row in weight]


@pytest.mark.parametrize(
    ("columns", "size", "blocks"), [(704, 128, 6), (704, 64, 11), (128, 128, 1), (48, 128, 1), (129, 128, 2)]
)
def test_blocks_that_do_not_divide_have_a_short_last_one(columns: int, size: int, blocks: int) -> None:
    weight = random_weight(5, columns)
    amax = weight_amax(weight, PerBlock(size))
    assert amax.shape == (5, blocks)
    expanded = expand_scale(amax, weight.shape, PerBlock(size))
    assert expanded.shape == weight.shape
    for column in (0, size - 1, size, columns - 1):
        if column < columns:
            assert torch.equal(expanded[:, column], amax[:, column // size])


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("fmt", [INT8, INT4], ids=lambda fmt: fmt.name)
def test_dequantized_weights_are_within_half_a_step(fmt: NumberFormat, granularity: PerTensor | PerBlock) -> None:
    scheme = TensorScheme(fmt, granularity)
    weight = random_weight(6, 10)
    amax = weight_amax(weight, granularity)
    scale = convert_to_scale(amax, fmt.maxbound).reshape(amax.shape)
    stored = quantize(weight, scale, scheme)
    assert stored.dtype == torch.int8
    assert fmt.qmin <= int(stored.min())
    assert int(stored.max()) <= fmt.qmax
    steps = expand_scale(scale, weight.shape, granularity).expand_as(weight)
    error = (dequantize(stored, scale, scheme) - weight).abs()
    assert bool((error <= steps * half_step(fmt.maxbound)).all())
    # the largest value of each group sits at the end of the range, so the scale is not needlessly large
    assert bool((weight_amax(stored.float(), granularity) == fmt.maxbound).all())


@settings(deadline=None)
@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=20), st.floats(2.0**-10, 2, width=32))
def test_fake_quantize_is_within_half_a_step_or_saturates(values: list[float], step: float) -> None:
    x, scale = torch.tensor(values), torch.tensor(step)
    y = fake_quantize(x, scale, INT8)
    inside = (x <= 127 * scale) & (x >= -128 * scale)
    assert bool(((y - x).abs() <= scale * half_step(128))[inside].all())
    assert bool((y[x > 127 * scale] == 127 * scale).all())
    assert bool((y[x < -128 * scale] == -128 * scale).all())
    assert torch.equal(fake_quantize(y, scale, INT8), y)  # a value on the grid stays


def test_float8_is_what_torch_stores_and_saturates() -> None:
    x = torch.tensor([0.0, 1.0, 1.06, -3.3, 448.0, 1e4, -1e4])
    stored = quantize(x[None], torch.tensor(1.0), TensorScheme(FLOAT8, PerTensor()))
    assert stored.dtype == torch.float8_e4m3fn
    assert stored.float()[0].tolist() == [0.0, 1.0, 1.0, -3.25, 448.0, 448.0, -448.0]
    assert torch.equal(fake_quantize(x, torch.tensor(1.0), FLOAT8), stored.float()[0])


def qdq_session(output_dtype: int) -> onnxruntime.InferenceSession:
    """A real QuantizeLinear and DequantizeLinear; 3 is ONNX's number for int8, 22 for int4."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> qdq (float[n] x, float s) => (float[n] y) '
        f"{{ q = QuantizeLinear <output_dtype = {output_dtype}> (x, s) y = DequantizeLinear (q, s) }}"
    )
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("fmt", "number"), [(INT8, 3), (INT4, 22)], ids=["int8", "int4"])
def test_fake_quantize_is_onnx_runtimes_to_the_bit(fmt: NumberFormat, number: int) -> None:
    session = qdq_session(number)
    generator = torch.Generator().manual_seed(7)
    differs_from_modelopt = 0
    for amax in (*torch.rand(40, generator=generator).mul(9).tolist(), 127.0, 0.25, 1e-30):
        scale = convert_to_scale(torch.tensor(amax), fmt.maxbound)
        ties = (torch.arange(fmt.qmin - 2, fmt.qmax + 3) + 0.5) * scale  # and their neighbours, and beyond the range
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
        ours = fake_quantize(x, scale, fmt)
        assert torch.equal(torch.from_numpy(found), ours)
        other = (x * (fmt.maxbound / amax)).round().clamp(fmt.qmin, fmt.qmax) * scale
        differs_from_modelopt += int((other != ours).sum())
    assert differs_from_modelopt > 0  # so the inputs do tell one rounding from another
