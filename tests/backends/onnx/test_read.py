"""Artifact -> graph -> artifact: what is read back equals what was written to the last bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import MODEL_FILE
from backends.onnx.targets import TARGETS
from calib.artifact import QuantizedLinear
from calib.errors import BackendError
from tests.backends.onnx.single import NAME, Single, accepted, schemes, single

CASES = [(target, words) for target in TARGETS for words in accepted(target)]


def written(case: Single, target: str, folder: Path) -> Path:
    ir.save(
        case.graph(target),
        folder / MODEL_FILE,
        external_data="model.onnx.data",
        size_threshold_bytes=1024,
    )
    return folder


def assert_same(found: QuantizedLinear, wanted: QuantizedLinear) -> None:
    for field in dataclasses.fields(wanted):
        before, after = getattr(wanted, field.name), getattr(found, field.name)
        if isinstance(before, Tensor):
            assert after is not None, field.name
            assert after.dtype == before.dtype, field.name
            assert after.shape == before.shape, field.name
            assert torch.equal(after.float(), before.float()), field.name
        else:
            assert after == before, field.name


@pytest.mark.parametrize(("target", "words"), CASES)
def test_linears_are_read_back_to_the_last_bit(target: str, words: str, tmp_path: Path) -> None:
    dtype = getattr(torch, TARGETS[target].compute_dtype)
    case = single(schemes()[words], dtype)
    found = OnnxBackend().read_linears(written(case, target, tmp_path), target)
    assert list(found) == [NAME]
    assert_same(found[NAME], case.linear)


@pytest.mark.parametrize("target", TARGETS)
def test_orders_and_short_blocks_are_read_back(target: str, tmp_path: Path) -> None:
    dtype = getattr(torch, TARGETS[target].compute_dtype)
    case = single(schemes()["int4 weights in blocks of 64, float inputs"], dtype, order=True)
    assert_same(
        OnnxBackend().read_linears(written(case, target, tmp_path), target)[NAME], case.linear
    )


def test_a_dead_block_keeps_the_smallest_power_of_two(tmp_path: Path) -> None:
    case = single(
        schemes()[
            "float8_e4m3 weights in blocks of 32, float8_e4m3 inputs in blocks of 32, e8m0 scales"
        ]
    )
    scale = case.linear.weight_scale.clone()
    scale[0, 0], scale[0, 1] = 2.0**-127, 2.0**127
    linear = dataclasses.replace(case.linear, weight_scale=scale)
    folder = written(Single(linear, case.inputs), "tensorrt", tmp_path)
    assert_same(OnnxBackend().read_linears(folder, "tensorrt")[NAME], linear)


def test_a_linear_whose_nodes_are_gone_is_named(tmp_path: Path) -> None:
    model = single(schemes()["int8 weights per channel, float inputs"]).graph("ort")
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            node.name = "renamed"
    ir.save(model, tmp_path / MODEL_FILE)
    with pytest.raises(BackendError, match="'linear' has no DequantizeWeight"):
        OnnxBackend().read_linears(tmp_path, "ort")
