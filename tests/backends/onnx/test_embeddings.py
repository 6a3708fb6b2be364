"""Quantized embeddings and logits of the last token alone."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from backends.onnx.backend import OnnxBackend
from backends.onnx.embeddings import lower_embeddings
from backends.onnx.targets import TARGETS
from backends.onnx.trace import TraceRequest
from backends.onnx.trace_cache import cached_trace
from backends.onnx.write import build
from calib.errors import BackendError
from calib.network.skeleton import portable_config
from calib.process.progress import silent
from calib.schemes import (
    FLOAT8,
    INT4,
    INT8,
    LinearScheme,
    PerBlock,
    PerChannel,
    PerTensor,
    TensorScheme,
)
from tests.answers import model_refusal
from tests.backends.onnx.whole import compare, quantized
from tests.tiny import CONFIGS
from tests.tolerances import WEIGHT_ONLY

TABLES = {
    "llama": ["model.embed_tokens"],
    "gemma3": ["model.embed_tokens"],  # scaled by a factor
    "opt": ["model.decoder.embed_tokens", "model.decoder.embed_positions"],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_quantized_embedding_is_the_reference(name: str, tmp_path: Path) -> None:
    model = quantized(CONFIGS[name](), overrides=dict.fromkeys(TABLES[name], "int8-weight-only"))
    assert compare(model, tmp_path).error <= WEIGHT_ONLY
    read = OnnxBackend().read_linears(tmp_path, "ort")
    for table in TABLES[name]:
        assert torch.equal(read[table].weight, model.linears[table].weight)
        assert torch.equal(read[table].weight_scale, model.linears[table].weight_scale)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_looked_up_before_they_are_dequantized_where_the_runtime_can(target: str) -> None:
    model = quantized(CONFIGS["llama"](), overrides={"model.embed_tokens": "int8-weight-only"})
    graph = build(model, TARGETS[target]).graph
    table = graph.initializers["model.embed_tokens.weight"]
    assert table.dtype == ir.DataType.INT8
    readers = [node.op_type for node in table.consumers()]
    assert readers == (["Gather"] if TARGETS[target].integer_rows else ["DequantizeLinear"])


@pytest.mark.parametrize("target", TARGETS)
def test_embeddings_that_have_no_operators_are_refused_before_anything_is_calibrated(
    target: str,
) -> None:
    name, config = "model.embed_tokens", portable_config(CONFIGS["llama"]())
    rows = TensorScheme(INT8, PerChannel())
    refused = [
        TensorScheme(INT4, PerChannel()),
        TensorScheme(FLOAT8, PerChannel()),
        TensorScheme(INT8, PerTensor()),
        TensorScheme(INT8, PerBlock(16)),
        TensorScheme(INT8, PerChannel(), symmetric=False),
    ]
    for scheme in refused:
        found = {
            name: LinearScheme(scheme, None),
            "model.layers.0.mlp.up_proj": LinearScheme(rows, None),
        }
        refusal = model_refusal(OnnxBackend(), config, found, target)
        assert refusal is not None
        assert "rows of int8" in refusal.reason
        assert name in refusal.hint
        # a linear is no embedding
        linears = {"model.layers.0.mlp.up_proj": LinearScheme(scheme, None)}
        assert model_refusal(OnnxBackend(), config, linears, target) is None
    assert model_refusal(OnnxBackend(), config, {name: LinearScheme(rows, None)}, target) is None


def test_an_artifact_with_such_an_embedding_is_not_written(tmp_path: Path) -> None:
    model = quantized(CONFIGS["llama"](), overrides={"model.embed_tokens": "int4-weight-only"})
    with pytest.raises(
        BackendError, match=r"'model.embed_tokens' cannot be written as ONNX.*one scale"
    ):
        compare(model, tmp_path)


def test_an_embedding_that_is_more_than_looked_up_is_refused() -> None:
    name = "model.embed_tokens"
    model = quantized(CONFIGS["llama"](), overrides={name: "int8-weight-only"})
    traced = cached_trace(TraceRequest(model.config, model.dtype, 21), silent)
    traced.graph.append(ir.node("Transpose", [traced.graph.initializers[f"{name}.weight"]]))
    with pytest.raises(BackendError, match=f"'{name}' cannot be quantized"):
        lower_embeddings(traced, model.linears, [name], integer_rows=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_of_the_last_token_alone(name: str, tmp_path: Path) -> None:
    found = compare(quantized(CONFIGS[name]()), tmp_path, logits="last")
    assert found.prefill.shape == (3, 1, 97)
    assert found.error <= WEIGHT_ONLY
    head = (
        OnnxBackend()
        .load_probed(tmp_path, "ort")
        .probe(torch.arange(5, 12)[None], ["lm_head"])["lm_head"]
    )
    assert head[0].shape[:2] == (1, 1)  # the head multiplies one row
