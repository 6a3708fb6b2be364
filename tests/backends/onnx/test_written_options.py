"""Every target, dtype, way to keep keys and values and choice of logits that the command line takes
is written and run; the others are refused.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from backends.asking import refusal_of
from backends.base import Request, WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.targets import TARGETS
from calib.artifact import QuantizedModel, cast_model
from calib.measure.reference import build_reference
from tests.backends.onnx.whole import batch, quantized
from tests.tiny import CONFIGS, relative_l2
from tests.tolerances import NAIVE, WEIGHT_ONLY

DTYPES = ("float32", "float16", "bfloat16")
TAKEN = {
    ("ort", "float32", "grown"),
    ("ort", "float32", "shared"),
    ("openvino", "float32", "grown"),
    ("tensorrt", "float16", "grown"),
    ("tensorrt", "float32", "grown"),
}


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    return quantized(CONFIGS["llama"](), ("r1", "r2"))


def _takes(backend: OnnxBackend, target: str, dtype: str, buffer: str) -> bool:
    request = Request(target, dtype=dtype, kv_buffer=buffer)  # type: ignore[arg-type]
    return refusal_of(backend, request) is None


def test_what_is_taken() -> None:
    backend = OnnxBackend()
    found = {
        (target, dtype, buffer)
        for target, dtype, buffer in product(TARGETS, DTYPES, ("grown", "shared"))
        if _takes(backend, target, dtype, buffer)
    }
    assert found == TAKEN
    assert all(refusal_of(backend, Request(target, logits="last")) is None for target in TARGETS)
    # what a target computes in where nothing is asked for
    assert all((name, backend.compute_dtype(name), "grown") in TAKEN for name in TARGETS)


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize(("target", "dtype", "buffer"), sorted(TAKEN))
@torch.no_grad()
def test_what_is_taken_runs(
    target: str, dtype: str, buffer: str, logits: str, model: QuantizedModel, tmp_path: Path
) -> None:
    artifact = cast_model(model, getattr(torch, dtype))
    options = WriteOptions(target, logits=logits, kv_buffer=buffer)  # type: ignore[arg-type]
    OnnxBackend().write(artifact, tmp_path, options)
    runtime = OnnxBackend().load(tmp_path, target, exact=True)

    rows = batch()
    named = {
        "input_ids": rows.ids,
        "attention_mask": rows.mask,
        "position_ids": rows.positions,
    }
    shown = rows.real if logits == "all" else torch.arange(rows.ids.shape[1]) == -1 % 12
    shown = shown.expand_as(rows.ids)
    wanted = build_reference(model)(**named).logits[shown]
    found, past = runtime.forward(rows.ids, rows.mask, rows.positions)
    found = found[shown] if logits == "all" else found[:, -1]
    bound = WEIGHT_ONLY
    if dtype == "float16":
        bound = NAIVE * relative_l2(build_reference(artifact)(**named).logits[shown], wanted)
    assert relative_l2(found, wanted) <= bound
    assert {tensor.shape[2] for tensor in past} == {rows.ids.shape[1]}
