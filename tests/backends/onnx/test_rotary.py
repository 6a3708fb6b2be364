"""RoPE as one operator."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
import pytest
import torch

from backends.onnx.rotary import ROTARY_OPSET, fuse_rotary
from backends.onnx.trace import TraceRequest
from backends.onnx.trace_cache import cached_trace
from calib.network.skeleton import portable_config
from calib.process.progress import silent
from tests.tiny import CONFIGS


def traced(config: Any) -> ir.Model:
    request = TraceRequest(portable_config(config), torch.float32, opset=21)
    return cached_trace(request, silent)


@pytest.mark.parametrize(
    ("name", "operators"),
    [("llama", 4), ("gemma3", 4), ("phi3-partial-rope", 4), ("smollm3", 2), ("gpt2", 0)],
)
def test_queries_and_keys_of_every_layer_have_it(name: str, operators: int) -> None:
    """Two layers; SmolLM3 leaves every other one without RoPE, and GPT-2 has none."""
    model = traced(CONFIGS[name]())
    fuse_rotary(model)
    found = Counter(node.op_type for node in model.graph)
    assert found["RotaryEmbedding"] == operators
    assert found["Neg"] == 0
    assert model.graph.opset_imports[""] == ROTARY_OPSET


def test_cosines_are_made_once_for_all_layers() -> None:
    model = traced(CONFIGS["llama"]())
    fuse_rotary(model)
    found = Counter(node.op_type for node in model.graph)
    assert (found["Cos"], found["Sin"]) == (1, 1)


def test_cosines_that_are_scaled_stay_spelled_out() -> None:
    config = CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    model = traced(config)
    fuse_rotary(model)
    found = Counter(node.op_type for node in model.graph)
    assert (found["RotaryEmbedding"], found["Neg"]) == (0, 4)
