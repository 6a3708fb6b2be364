"""Traced graphs hold no weight, need none, and say which module cannot be traced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from backends.onnx.placeholders import ATTENTION, DOMAIN, LINEAR
from backends.onnx.targets import TARGETS
from backends.onnx.trace import CHECKPOINT, TraceRequest, fill, trace
from backends.onnx.trace_cache import cached_trace
from backends.onnx.write import build
from calib.errors import BackendError, CheckpointError
from calib.network.skeleton import portable_config
from calib.process.progress import silent
from tests.tiny import CONFIGS, quantize_tiny

SMALL = 128
"""Elements of the largest constant of a trace: rotary frequencies, and none of the weights of these
models.
"""


def request(name: str, **options: Any) -> TraceRequest:
    return TraceRequest(portable_config(CONFIGS[name]()), torch.float32, 21, **options)


@pytest.fixture(scope="module")
def llama() -> ir.Model:
    return cached_trace(request("llama"), silent)


def test_linears_and_attention_are_placeholders_and_weights_have_no_values(llama: ir.Model) -> None:
    operators = [node.op_type for node in llama.graph if node.domain == DOMAIN]
    assert operators.count(LINEAR) == 15
    assert operators.count(ATTENTION) == 2
    promised = {
        name: value.const_value
        for name, value in llama.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    norms = [
        f"model.layers.{i}.{norm}_layernorm.weight"
        for i in range(2)
        for norm in ("input", "post_attention")
    ]
    assert set(promised) == {"model.embed_tokens.weight", "model.norm.weight", *norms}
    assert {tensor.location for tensor in promised.values()} == {CHECKPOINT}
    others = [
        value.const_value
        for name, value in llama.graph.initializers.items()
        if name not in promised
    ]
    assert all(tensor is not None and tensor.size <= SMALL for tensor in others)


def test_no_large_tensor_is_read_until_the_graph_is_written() -> None:
    """Tensors on the meta device have no data: reading one raises."""
    model = quantize_tiny(CONFIGS["llama"](), "int8-weight-only", ["r1", "r2", "r4"])
    floats = {key: tensor.to("meta") for key, tensor in model.floats.items()}
    linears = {
        name: replace(linear, weight=linear.weight.to("meta"))
        for name, linear in model.linears.items()
    }
    graph = build(replace(model, floats=floats, linears=linears), TARGETS["ort"]).graph
    for key in (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "lm_head.weight",
    ):
        tensor = graph.initializers[key].const_value
        assert isinstance(tensor, ir.LazyTensor)
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            tensor.numpy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda floats: floats.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (
            lambda floats: floats.update({"model.norm.weight": torch.ones(47)}),
            r"'model.norm.weight' is \(47,\)",
        ),
        (
            lambda floats: floats.update({"model.norm.weight": torch.ones(48).half()}),
            r"float16, not \(48,\) FLOAT",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(llama: ir.Model, change: Any, message: str) -> None:
    model = quantize_tiny(CONFIGS["llama"](), "int8-weight-only")
    floats = dict(model.floats)
    change(floats)
    with pytest.raises(CheckpointError, match=message):
        fill(ir.from_proto(ir.to_proto(llama)), floats)


@pytest.fixture
def broken_mlp(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the activation of the MLP of every Llama computes: the last entry, where there is
    one.
    """
    function: list[Any] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(function[-1](self.gate_proj(x)) * self.up_proj(x))
        return result

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    return function


def test_an_operator_without_translation_is_named_with_its_module(broken_mlp: list[Any]) -> None:
    broken_mlp.append(torch.special.bessel_j0)
    with pytest.raises(BackendError, match=r"'model.layers.0.mlp'.*bessel_j0") as caught:
        trace(request("llama"))
    assert "safetensors" in (caught.value.hint or "")


def test_a_module_whose_path_depends_on_values_is_named(broken_mlp: list[Any]) -> None:
    broken_mlp.append(lambda x: x if bool(x.sum() > 0) else -x)
    with pytest.raises(BackendError, match=r"'model.layers.0.mlp'"):
        trace(request("llama"))


def test_attention_that_no_placeholder_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_llama.LlamaAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs, position_bias=torch.ones(6))

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with pytest.raises(
        BackendError, match="LlamaAttention cannot be written as ONNX: it takes position_bias"
    ):
        trace(request("llama"))
