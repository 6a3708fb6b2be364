"""Tracing a causal LM with every linear left open.

The model is traced once with each linear replaced by a placeholder node ``rotq::Linear(x)`` that carries nothing but
the module's name. :mod:`backends.onnx.lower` then puts weights, scales and online rotations in its place. So no linear
weight is in memory during the trace, none is constant-folded or renamed, and the graph does not depend on the scheme.

An online R3 sits inside the attention, after RoPE and before the cache, so it is traced with the model: a Reshape and a
MatMul with a small constant for each Kronecker factor. Cached keys are rotated, in ``past_key_values`` as in
``present``.

Inputs and outputs have the names that onnxruntime-genai and optimum know:

    input_ids [batch, sequence], attention_mask [batch, total], position_ids [batch, sequence],
    past_key_values.{i}.key|value [batch, kv_heads, past, head_dim]
        -> logits [batch, sequence, vocabulary], present.{i}.key|value [batch, kv_heads, total, head_dim]
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from calib.architectures import architecture_for
from calib.errors import BackendError
from calib.modules import set_submodule
from calib.online import attach_online
from calib.rotations.rotation_set import RotationSet
from calib.skeleton import build_skeleton

DOMAIN = "rotq"
LINEAR = "Linear"
MODULE_ATTRIBUTE = "module"
_ROOT = "network"


class _OpenLinear(nn.Module):
    """Stands for ``y = x W^T + b`` of the module called ``name``; ``[..., in]`` -> ``[..., out]``."""

    def __init__(self, name: str, out_features: int) -> None:
        super().__init__()
        self.name = name
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        attributes: dict[str, Any] = {MODULE_ATTRIBUTE: self.name}
        return torch.onnx.ops.symbolic(f"{DOMAIN}::{LINEAR}", (x,), attributes, dtype=x.dtype, shape=shape, version=1)


class _FlatCache(nn.Module):
    """The model with its cache as a flat list of tensors, which is what a graph can have as inputs and outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        output = self.network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *present)


def trace(
    config: Mapping[str, Any],
    floats: Mapping[str, Tensor],
    widths: Mapping[str, int],
    *,
    opset: int,
    r3: RotationSet | None = None,
) -> ir.Model:
    """Trace the model of ``config`` to an ONNX graph whose linears in ``widths`` are ``rotq::Linear`` placeholders.

    Args:
        config: Hugging Face config as a dictionary.
        floats: every parameter outside those linears, by checkpoint key, in the dtype of the graph.
        widths: output features of each linear, by module name.
        opset: ONNX opset of the result.
        r3: online rotations of queries and keys to put into the graph.

    Returns:
        A model whose float initializers have their checkpoint keys as names.

    Raises:
        BackendError: the exporter has no translation for something the model does.
    """
    network = build_skeleton(config, floats, skip=widths)
    for name, out_features in widths.items():
        set_submodule(network, name, _OpenLinear(name, out_features))
    if r3:
        hf_config: Any = network.config
        attach_online(network, architecture_for(hf_config), hf_config, r3)
    inputs, names, dynamic = _example(network, next(iter(floats.values())).dtype)
    layers = (len(names) - 3) // 2
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                _FlatCache(network).eval(),
                inputs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic,
                input_names=names,
                output_names=["logits", *_cache_names("present", layers)],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            cause = str(error).strip().splitlines()[0]
            raise BackendError(
                f"torch.onnx cannot export a '{config['model_type']}' model: {cause}",
                hint="run with -v for the exporter's own report; the safetensors backend does not trace the model",
            ) from error
    if program is None:  # the exporter's signature allows it; with dynamo=True it does not happen
        raise BackendError("torch.onnx returned no program")
    model = program.model
    _restore_names(model)
    _name_output_axes(model)
    return model


def _example(network: nn.Module, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[str], tuple[Any, ...]]:
    """Example inputs, their names and their dynamic axes. Dynamic sizes differ and exceed 1: none is specialised."""
    config: Any = network.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers, batch, sequence, past = config.num_hidden_layers, 2, 3, 5
    ids = torch.zeros(batch, sequence, dtype=torch.long)
    mask = torch.ones(batch, past + sequence, dtype=torch.long)
    positions = torch.arange(past, past + sequence).repeat(batch, 1)
    cache = tuple(torch.zeros(batch, heads, past, head_dim, dtype=dtype) for _ in range(2 * layers))
    tokens, cached = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    dynamic = (tokens, {0: "batch", 1: "total"}, tokens, (cached,) * len(cache))
    names = ["input_ids", "attention_mask", "position_ids", *_cache_names("past_key_values", layers)]
    return (ids, mask, positions, *cache), names, dynamic


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _restore_names(model: ir.Model) -> None:
    """Give float initializers their checkpoint keys back: the trace saw them below the wrapper."""
    initializers = model.graph.initializers
    for value in list(initializers.values()):
        if value.name is not None and value.name.startswith(f"{_ROOT}."):
            value.name = value.name.removeprefix(f"{_ROOT}.")


def _name_output_axes(model: ir.Model) -> None:
    """Call the grown cache axis ``total``, as in the attention mask; the exporter writes ``past + sequence``."""
    for output in model.graph.outputs:
        if output.name is not None and output.name.startswith("present.") and output.shape is not None:
            output.shape = ir.Shape([output.shape[0], output.shape[1], "total", output.shape[3]])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on packages and axis names that have no bearing on the graph, unless debugging."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
