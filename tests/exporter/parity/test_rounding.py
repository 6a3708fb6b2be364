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
) -> list[ParityRow]:
    """The rows of a tiny model, one of its linears changed."""
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()), ["r1"])
    quantized: QuantizedModel = quantize_fused(fused, scheme)
    provenance = replace(quantized.provenance, recipe=recipe)
    linears = dict(quantized.linears)
    if change is not None:
        linears[DOWN] = change(linears[DOWN], fused.state[f"{DOWN}.weight"])
    quantized = cast_model(replace(quantized, linears=linears, provenance=provenance), dtype)
    return rounding_rows(Subject(quantized, OnnxBackend(), "ort", Path(), [], None, fused))


@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only", "int4-weight-only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_rounded_to_nearest_is_half_a_step_away(scheme: str, dtype: torch.dtype) -> None:
    (row,) = judged(scheme, dtype=dtype)
    assert row.passed
    assert row.measured is not None
    assert 0.4 < row.measured <= HALF


def down(linear: QuantizedLinear, weight: torch.Tensor) -> QuantizedLinear:
    scale, _ = expand_grid(linear.grid, weight.shape, linear.weight_scheme.granularity)
    return replace(linear, weight=(weight / scale).floor().to(torch.int8))


def one_more(linear: QuantizedLinear, weight: torch.Tensor) -> QuantizedLinear:
    codes = linear.weight.clone()
    codes[3, 5] += 1 if codes[3, 5] < 100 else -1
    return replace(linear, weight=codes)


@pytest.mark.parametrize("change", [down, one_more])
def test_what_is_not_is_named(change: Any) -> None:
    (row,) = judged("int8-weight-only", change)
    assert row.passed is False
    assert DOWN in row.note


def test_an_algorithm_that_rounds_otherwise_is_not_held_to_it() -> None:
    assert judged("int8-weight-only", down, recipe={"weights": {"algorithm": "gptq"}}) == []
    assert judged("float") == []
