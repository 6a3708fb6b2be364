"""One calibration for targets of other dtypes: floats and scales are rounded once, and nothing else
moves.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from calib.artifact import QuantizedModel, cast_model
from calib.errors import QuantizationError
from tests.tiny import quantize_tiny, wide_llama
from tests.tolerances import rounded_once

HALF = (torch.float16, torch.bfloat16)
NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    return quantize_tiny(wide_llama(), "int8", ["r1", "r4"])


@pytest.mark.parametrize("dtype", HALF)
def test_floats_and_scales_are_rounded_once_and_integers_stay(
    quantized: QuantizedModel, dtype: torch.dtype
) -> None:
    cast = cast_model(quantized, dtype)
    assert cast.dtype == dtype
    assert list(cast.linears) == list(quantized.linears)
    assert all(
        torch.equal(cast.floats[key], tensor.to(dtype)) for key, tensor in quantized.floats.items()
    )
    for name, before in quantized.linears.items():
        after = cast.linears[name]
        assert torch.equal(after.weight, before.weight)
        assert after.input_scale is not None
        assert before.input_scale is not None
        assert (after.weight_scale.dtype, after.input_scale.dtype) == (dtype, dtype)
        assert torch.equal(after.weight_scale, before.weight_scale.to(dtype))
        error = (
            (after.values() - before.values()).abs() / before.values().abs().clamp(min=1e-30)
        ).max()
        assert float(error) <= rounded_once(dtype) + rounded_once(torch.float32)


def test_nothing_is_cast_before_it_is_asked_for(quantized: QuantizedModel) -> None:
    broken = replace(quantized, floats={"a": torch.tensor([1e6])})
    cast = cast_model(broken, torch.float16)
    with pytest.raises(
        QuantizationError, match="'a' overflows float16: its largest magnitude is 1e"
    ):
        _ = cast.floats["a"]


def test_the_same_dtype_is_the_same_model(quantized: QuantizedModel) -> None:
    assert cast_model(quantized, torch.float32) is quantized


def test_the_scales_of_nvfp4_keep_float32() -> None:
    linear = cast_model(quantize_tiny(wide_llama(), "nvfp4"), torch.float16).linears[NAME]
    assert linear.weight_scale.dtype == torch.float32
    assert linear.weight_second_scale is not None
    assert linear.weight_second_scale.dtype == torch.float32
    assert linear.input_scale is not None
    assert linear.input_scale.dtype == torch.float32


def _with_scale(quantized: QuantizedModel, value: float, *, empty: bool) -> QuantizedModel:
    linear = quantized.linears[NAME]
    scale, weight = linear.weight_scale.clone(), linear.weight.clone()
    scale[3] = value
    if empty:
        weight[3] = 0
    return replace(quantized, linears={NAME: replace(linear, weight=weight, weight_scale=scale)})


def test_a_scale_that_underflows_is_an_error_unless_nothing_is_stored_under_it(
    quantized: QuantizedModel,
) -> None:
    lost = cast_model(_with_scale(quantized, 2e-6, empty=False), torch.float16)
    with pytest.raises(
        QuantizationError, match=f"the weight of '{NAME}' underflows float16: it is 2e-06"
    ) as caught:
        _ = lost.linears[NAME]
    assert "--dtype float16" in str(caught.value.hint)
    for value in (2e-6, torch.finfo(torch.float32).tiny):
        found = cast_model(_with_scale(quantized, value, empty=True), torch.float16).linears[NAME]
        assert float(found.weight_scale[3]) == torch.finfo(torch.float16).tiny
        assert not found.values()[3].any()


def test_a_subnormal_scale_that_keeps_its_precision_is_kept(quantized: QuantizedModel) -> None:
    found = cast_model(_with_scale(quantized, 3e-5, empty=False), torch.float16).linears[NAME]
    assert float(found.weight_scale[3]) == pytest.approx(3e-5, rel=2**-8)


def test_the_smallest_scale_of_float16_is_a_scale_like_any_other(quantized: QuantizedModel) -> None:
    """What calibration in float16 gives a channel of small weights, where float32 would have gone
    lower.
    """
    tiny = torch.finfo(torch.float16).tiny
    model = _with_scale(cast_model(quantized, torch.float16), tiny, empty=False)
    linear = replace(model.linears[NAME], input_scale=torch.tensor(tiny, dtype=torch.float16))
    for dtype in (torch.float32, torch.bfloat16):
        found = cast_model(replace(model, linears={NAME: linear}), dtype).linears[NAME]
        assert float(found.weight_scale[3]) == tiny
        assert found.input_scale is not None
        assert float(found.input_scale) == tiny


def test_a_dead_input_gets_the_smallest_scale_of_the_new_dtype(quantized: QuantizedModel) -> None:
    dead = torch.tensor(torch.finfo(torch.float32).tiny)
    model = replace(quantized, linears={NAME: replace(quantized.linears[NAME], input_scale=dead)})
    assert (
        float(cast_model(model, torch.float16).linears[NAME].input_scale)
        == torch.finfo(torch.float16).tiny
    )  # type: ignore[arg-type]
    small = replace(
        quantized, linears={NAME: replace(quantized.linears[NAME], input_scale=torch.tensor(1e-7))}
    )
    with pytest.raises(QuantizationError, match="the input of"):
        _ = cast_model(small, torch.float16).linears[NAME]
