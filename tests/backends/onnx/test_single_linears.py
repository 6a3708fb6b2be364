"""Linears that differ from their neighbours: left in float behind an online rotation, or with an
order of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from calib.architectures import Kind
from calib.artifact import QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.measure.reference import ReferenceLinear, build_reference
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import customised, resolve
from calib.schemes import scheme_named
from tests.tiny import CONFIGS, PROVENANCE, fuse_tiny, make_tiny, relative_l2, token_rows
from tests.tolerances import LINEAR, WEIGHT_ONLY


def _quantized(
    name: str, kinds: list[Kind], block_size: int | None = None, **settings: Any
) -> QuantizedModel:
    fused = fuse_tiny(make_tiny(CONFIGS[name]()), kinds)
    scheme = customised(scheme_named("int8-weight-only"), block_size=block_size)
    how = resolve(scheme, fused.wiring, **settings)
    return quantize_model(
        fused, how, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
    )


def _end_to_end(quantized: QuantizedModel, folder: Path) -> float:
    OnnxBackend().write(quantized, folder, WriteOptions("ort"))
    ids = torch.stack(token_rows((12, 12), seed=4))
    positions = torch.arange(12).expand_as(ids)
    logits, _ = (
        OnnxBackend().load(folder, "ort", exact=True).forward(ids, torch.ones_like(ids), positions)
    )
    with torch.no_grad():
        return relative_l2(logits, build_reference(quantized)(input_ids=ids).logits)


@pytest.mark.parametrize(("name", "linear"), [("llama", "*.0.mlp.down_proj"), ("opt", "*.0.fc2")])
def test_r4_runs_before_a_linear_that_an_override_leaves_in_float(
    name: str, linear: str, tmp_path: Path
) -> None:
    quantized = _quantized(name, ["r1", "r2", "r4"], overrides={linear: "float"})
    assert _end_to_end(quantized, tmp_path) <= WEIGHT_ONLY


def test_weights_in_an_order_of_their_own_meet_inputs_in_that_order(tmp_path: Path) -> None:
    quantized = _quantized(
        "llama", ["r1", "r2", "r4"], block_size=16, weights="gptq:static_groups=false"
    )
    assert all(linear.weight_order is not None for linear in quantized.linears.values())
    assert _end_to_end(quantized, tmp_path) <= WEIGHT_ONLY
    reference = build_reference(quantized)
    read, probed = (
        OnnxBackend().read_linears(tmp_path, "ort"),
        OnnxBackend().load_probed(tmp_path, "ort"),
    )
    for name, (entering, leaving) in probed.probe(
        token_rows((12,))[0][None], list(quantized.linears)
    ).items():
        assert torch.equal(read[name].values(), quantized.linears[name].values())
        linear = reference.get_submodule(name)
        assert isinstance(linear, ReferenceLinear)
        assert relative_l2(leaving, linear.matmul(linear.quantize(entering))) <= LINEAR, name
