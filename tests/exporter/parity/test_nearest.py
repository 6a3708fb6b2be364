"""Weights that are said to be rounded to nearest are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.onnx.backend import OnnxBackend
from calib.arithmetic.grids import expand_grid
from calib.artifact import QuantizedLinear, QuantizedModel, cast_model
from exporter.parity import Subject
from exporter.parity.rounding import HALF, rounding_rows
from exporter.reporting.report import ParityRow
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, quantize_fused

DOWN = "model.layers.0.mlp.down_proj"
ROUNDED = {"weights": {"algorithm": "rtn"}}


def judged(
    scheme: str,
    change: Any = None,
    dtype: torch.dtype = torch.float32,
    recipe: dict[str, Any] = ROUNDED,
    made_in: torch.dtype = torch.float32,
) -> list[ParityRow]:
    """The rows of a tiny model, one of its linears changed."""
    tiny = make_tiny(CONFIGS["llama"]())
    tiny.state[f"{DOWN}.weight"][0] *= 1e-3  # its scale is below the normal numbers of float16
    quantized: QuantizedModel = quantize_fused(fuse_tiny(tiny, ["r1"], made_in), scheme)
    fused = fuse_tiny(tiny, ["r1"], dtype)
    provenance = replace(quantized.provenance, recipe=recipe)
    linears = dict(quantized.linears)
    if change is not None:
        linears[DOWN] = change(linears[DOWN], fused.state[f"{DOWN}.weight"])
    quantized = cast_model(replace(quantized, linears=linears, provenance=provenance), dtype)
    return rounding_rows(Subject(quantized, OnnxBackend(), "ort", Path(), [], None, fused))


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only", "int4-weight-only"])
@pytest.mark.parametrize("made_in", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_rounded_to_nearest_is_half_a_step_away(
    scheme: str, made_in: torch.dtype, dtype: torch.dtype
) -> None:
    """Also where an artifact of one dtype is written in another."""
    (row,) = judged(scheme, dtype=dtype, made_in=made_in)
    assert row.passed
    assert row.measured is not None
    assert 0.4 < row.measured <= HALF


def down(linear: QuantizedLinear, weight: torch.Tensor) -> QuantizedLinear:
    scale, _ = expand_grid(linear.grid, weight.shape, linear.weight_scheme.granularity)
    return replace(linear, weight=(weight / scale).floor().to(torch.int8))


def one_more(linear: QuantizedLinear, weight: torch.Tensor) -> QuantizedLinear:
    """Of a weight within a step of zero, which no rounding of scales can move as far."""
    codes = linear.weight.clone()
    codes.view(-1)[(codes.view(-1).abs() <= 1).nonzero()[0]] += 2
    return replace(linear, weight=codes)


@pytest.mark.parametrize("change", [down, one_more])
def test_what_is_not_is_named(change: Any) -> None:
    (row,) = judged("int8-weight-only", change)
    assert row.passed is False
    assert DOWN in row.note


def test_an_algorithm_that_rounds_otherwise_is_not_held_to_it() -> None:
    assert judged("int8-weight-only", down, recipe={"weights": {"algorithm": "gptq"}}) == []
    assert judged("float") == []
