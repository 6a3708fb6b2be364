"""R3 in the exported graph: standard nodes after RoPE, rotated keys in the cache, and logits that
do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import Tensor

from backends.onnx.runner import OnnxModel
from backends.onnx.targets import TARGETS
from backends.onnx.write import build
from calib.artifact import QuantizedModel
from calib.measure.reference import build_reference
from tests.tiny import SIZES, quantize_tiny, relative_l2, token_rows
from tests.tolerances import WEIGHT_ONLY

HEAD_DIM = 128  # two Kronecker factors, 16 and 8
LAYERS = 2


@dataclass(frozen=True)
class Written:
    """An artifact, its graph, and the file."""

    quantized: QuantizedModel
    graph: ir.Model
    path: Path


def _write(folder: Path, kinds: list[Any]) -> Written:
    folder.mkdir()
    config = transformers.LlamaConfig(**SIZES, head_dim=HEAD_DIM)
    quantized = quantize_tiny(config, "int8-weight-only", kinds)
    graph = build(quantized, TARGETS["ort"])
    path = folder / "model.onnx"
    ir.save(graph, path)
    return Written(quantized, graph, path)


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return _write(tmp_path_factory.mktemp("r3") / "rotated", ["r3"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return _write(tmp_path_factory.mktemp("r3") / "plain", [])


def prefill(path: Path, row: Tensor) -> tuple[Tensor, list[Tensor]]:
    ids = row.unsqueeze(0)
    return OnnxModel(path, exact=True).forward(
        ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None]
    )


def factor_products(graph: ir.Model, order: int) -> list[ir.Node]:
    """MatMuls with a constant ``[order, order]``."""
    return [
        node
        for node in graph.graph
        if node.op_type == "MatMul"
        and any(
            value is not None and value.const_value is not None and value.shape == (order, order)
            for value in node.inputs
        )
    ]


def test_queries_and_keys_meet_one_small_product_per_factor(
    rotated: Written, plain: Written
) -> None:
    for order in (16, 8):
        assert len(factor_products(rotated.graph, order)) == 2 * LAYERS
        assert not factor_products(plain.graph, order)
    assert not factor_products(rotated.graph, HEAD_DIM)
    assert {node.domain for node in rotated.graph.graph} == {""}


def test_keys_are_rotated_and_logits_are_not(rotated: Written, plain: Written) -> None:
    row = token_rows()[0]
    (with_r3, cache), (without, keys_and_values) = (
        prefill(rotated.path, row),
        prefill(plain.path, row),
    )
    assert relative_l2(with_r3, without) <= WEIGHT_ONLY
    for layer in range(LAYERS):
        rotation = rotated.quantized.rotations[f"R3.{layer}"]
        key, value = keys_and_values[2 * layer : 2 * layer + 2]
        assert relative_l2(cache[2 * layer], rotation.apply(key)) <= WEIGHT_ONLY
        assert relative_l2(cache[2 * layer], key) > 0.5  # another vector altogether
        assert relative_l2(cache[2 * layer + 1], value) <= WEIGHT_ONLY


def test_the_logits_depend_on_the_nodes(rotated: Written, tmp_path: Path) -> None:
    row = token_rows()[0]
    model = ir.load(rotated.path)
    for node in factor_products(model, 16)[:1]:
        constant = next(
            value for value in node.inputs if value is not None and value.const_value is not None
        )
        constant.const_value = ir.tensor(np.eye(16, dtype=np.float32) * 0.5, name=constant.name)
    ir.save(model, tmp_path / "changed.onnx")
    before, _ = prefill(rotated.path, row)
    after, _ = prefill(tmp_path / "changed.onnx", row)
    assert relative_l2(after, before) > 1e-3  # 100 times what rounding could do


def test_decoding_with_the_cache_equals_prefill(rotated: Written) -> None:
    row = token_rows()[1]
    wanted, _ = prefill(rotated.path, row)
    model = OnnxModel(rotated.path, exact=True)
    cache: list[Tensor] | None = None
    steps = []
    for position in range(row.numel()):
        mask = torch.ones(1, position + 1, dtype=torch.int64)
        logits, cache = model.forward(
            row[position].reshape(1, 1), mask, torch.tensor([[position]]), cache
        )
        steps.append(logits[:, -1])
    assert relative_l2(torch.stack(steps, dim=1), wanted) <= WEIGHT_ONLY


def test_the_reference_rotates_the_same(rotated: Written, plain: Written) -> None:
    row = token_rows()[0]
    logits, cache = prefill(rotated.path, row)
    with torch.no_grad():
        output = build_reference(rotated.quantized)(input_ids=row[None], use_cache=True)
        other = build_reference(plain.quantized)(input_ids=row[None], use_cache=True)
    assert relative_l2(logits, output.logits) <= WEIGHT_ONLY
    assert relative_l2(cache[0], output.past_key_values.layers[0].keys) <= WEIGHT_ONLY
    assert (
        relative_l2(output.past_key_values.layers[0].keys, other.past_key_values.layers[0].keys)
        > 0.5
    )
