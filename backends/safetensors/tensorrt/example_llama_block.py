"""Example: one decoder layer of a rotated, quantized Llama, from a ``tensorrt`` bundle to an
engine, and its run.

    from backends.safetensors.tensorrt.example_llama_block import build_block, run_block

    plan = build_block("bundle", layer=0, tokens=128, capabilities=("SM86", "SM89"))  # with
    tensorrt_rtx, no GPU needed y = run_block(plan, x)
    # on a GPU

The layer takes hidden states ``[T, D]`` of the rotated stream in the bundle's dtype and returns
them. T = tokens, D = model width, H = query heads, K = key and value heads, d = head width, p =
tokens of the bundle's prefix, whose keys and values are constants of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backends.base import RuntimeMissing
from backends.safetensors.source import sliding_window
from backends.safetensors.tensorrt.api import Network, NetworkTensor
from backends.safetensors.tensorrt.loader import BundleWeights, open_weights, tensorrt_module
from backends.safetensors.tensorrt.network import NetworkBuilder
from calib.architectures import wiring_of
from calib.errors import BackendError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MODEL_TYPES = ("llama", "mistral", "qwen2")
_VARYING_ROPE = ("dynamic", "longrope")
"""Kinds of rotary frequencies that change with the length of the sequence."""
_HIDDEN = -1e4
"""Score of a token that is not to be seen; exp(-1e4) is 0, and float16 holds it."""


def build_block(
    folder: Path | str,
    *,
    layer: int,
    tokens: int,
    capabilities: Sequence[str] = (),
    refit: bool = False,
    trt: ModuleType | None = None,
) -> bytes:
    """Build the engine of one decoder layer.

    Args:
        folder: a ``tensorrt`` bundle of a Llama, Mistral or Qwen2 model.
        layer: which one.
        tokens: length of the sequence.
        capabilities: GPUs to build for (``SM86``, ``SM89``, ``SM120``), with ``tensorrt_rtx``
            whether there is one or not; by default the one at hand.
        refit: let weights be changed later; needs a GPU.
        trt: ``tensorrt`` or ``tensorrt_rtx``; by default the one that is installed.

    Returns:
        The serialized engine.

    Raises:
        BackendError: the bundle is damaged or of another model, or TensorRT cannot build it; its
            log says why.
    """
    weights = open_weights(folder, trt)
    trt = weights.trt
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(_strongly_typed(trt))
    # holds what TensorRT does not copy
    block = add_block(network, weights, layer=layer, tokens=tokens)
    config = builder.create_builder_config()

    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    plan = builder.build_serialized_network(network, config)
    del block

    if plan is None:
        raise BackendError(
            f"TensorRT cannot build layer {layer} of '{folder}' for"
            f" {', '.join(capabilities) or 'this GPU'}",
            hint="its log says why; float8 and MXFP8 need SM89, NVFP4 needs SM120",
        )

    return bytes(plan)


def add_block(
    network: Network, weights: BundleWeights, *, layer: int, tokens: int
) -> NetworkBuilder:
    """Add input, decoder layer and output to an empty network; the arguments of
    :func:`build_block`.

    Returns:
        What holds the memory of constants; keep it until the engine is built.
    """
    config = wiring_of(weights.bundle.manifest.config).config
    refusal = _refusal(config, layer)
    if refusal is not None:
        raise BackendError(
            refusal, hint="write yours with backends.safetensors.tensorrt.network.NetworkBuilder"
        )

    block = _Block(NetworkBuilder(network, weights), layer, tokens)
    x = network.add_input("hidden_states", block.net.dtype, (tokens, block.config.hidden_size))
    x = block.net.binary("SUM", x, block.attention(block.norm(x, "input_layernorm")))
    x = block.net.binary("SUM", x, block.mlp(block.norm(x, "post_attention_layernorm")))
    x.name = "output"
    network.mark_output(x)

    return block.net


def run_block(plan: bytes, x: Tensor, trt: ModuleType | None = None) -> Tensor:
    """Run an engine of :func:`build_block`.

    Args:
        plan: the engine.
        x: ``[T, D]`` on a CUDA device, in the bundle's dtype.
        trt: as for :func:`build_block`.

    Raises:
        RuntimeMissing: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeMissing(
            "an engine runs on a GPU, and there is none", hint="build here, run there"
        )

    trt = trt or tensorrt_module()
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    x = x.contiguous()
    out = torch.empty_like(x)
    context.set_tensor_address("hidden_states", x.data_ptr())
    context.set_tensor_address("output", out.data_ptr())
    stream = torch.cuda.current_stream()

    if not context.execute_async_v3(stream.cuda_stream):
        raise BackendError("TensorRT could not run the engine", hint="its log says why")

    stream.synchronize()
    return out


def _refusal(config: PretrainedConfig, layer: int) -> str | None:
    """Why this example does not build a layer of a model, if so."""
    if config.model_type not in _MODEL_TYPES:
        return (
            f"this example builds layers of {', '.join(_MODEL_TYPES)} models, not of"
            f" '{config.model_type}'"
        )
    if config.hidden_act != "silu":
        return f"this example builds MLPs with silu, not with '{config.hidden_act}'"
    if (config.rope_parameters or {}).get("rope_type", "default") in _VARYING_ROPE:
        return (
            "this example has constant rotary frequencies, and those of this model change with the"
            " sequence"
        )
    if not 0 <= layer < config.num_hidden_layers:
        return f"the model has layers 0 to {config.num_hidden_layers - 1}, and no layer {layer}"

    return None


class _Block:
    """The parts of one decoder layer."""

    def __init__(self, net: NetworkBuilder, layer: int, tokens: int) -> None:
        self.net = net
        self.layer = layer
        self.prefix = f"model.layers.{layer}"
        self.tokens = tokens
        wiring = wiring_of(net.weights.bundle.manifest.config)
        self.config, self.sizes = wiring.config, wiring.sizes
        self.before = 0 if net.weights.prefix is None else net.weights.prefix.length

    def norm(self, x: NetworkTensor, name: str) -> NetworkTensor:
        """``x / rms(x) g`` in float32."""
        net, trt = self.net, self.net.trt
        wide = net.cast(x, trt.DataType.FLOAT)
        mean = net.network.add_reduce(
            net.binary("PROD", wide, wide), trt.ReduceOperation.AVG, 1 << 1, True
        )
        eps = net.array(np.full((1, 1), self.config.rms_norm_eps, np.float32), trt.DataType.FLOAT)
        root = net.network.add_unary(
            net.binary("SUM", mean.get_output(0), eps), trt.UnaryOperation.SQRT
        )
        scaled = net.cast(net.binary("DIV", wide, root.get_output(0)), net.dtype)

        return net.binary(
            "PROD", scaled, net.constant(f"{self.prefix}.{name}.weight", (1, self.sizes.hidden))
        )

    def attention(self, x: NetworkTensor) -> NetworkTensor:
        """Causal attention over grouped heads ``[K, H / K, T, d]``, behind the prefix."""
        net, sizes = self.net, self.sizes
        query = self._heads(net.linear(x, f"{self.prefix}.self_attn.q_proj"), sizes.heads)
        key = self._heads(net.linear(x, f"{self.prefix}.self_attn.k_proj"), sizes.kv_heads)
        value = self._heads(net.linear(x, f"{self.prefix}.self_attn.v_proj"), sizes.kv_heads)
        query = self._online(self._rope(query), sizes.heads)
        key = self._behind_prefix(self._online(self._rope(key), sizes.kv_heads), "key")
        value = self._behind_prefix(value, "value")
        scores = net.cast(net.matmul(query, key, transposed=True), net.trt.DataType.FLOAT)
        scale = np.full((1, 1, 1, 1), sizes.head_dim**-0.5, np.float32)
        scores = net.binary("PROD", scores, net.array(scale, net.trt.DataType.FLOAT))
        scores = net.binary("SUM", scores, net.array(self._mask(), net.trt.DataType.FLOAT))
        softmax = net.network.add_softmax(scores)
        softmax.axes = 1 << 3
        mixed = net.matmul(net.cast(softmax.get_output(0), net.dtype), value)
        joined = net.network.add_shuffle(mixed)
        joined.first_transpose = (2, 0, 1, 3)
        joined.reshape_dims = (self.tokens, sizes.heads * sizes.head_dim)

        return net.linear(joined.get_output(0), f"{self.prefix}.self_attn.o_proj")

    def mlp(self, x: NetworkTensor) -> NetworkTensor:
        """``down(silu(gate x) up x)``; the rotation before ``down`` is the builder's."""
        net = self.net
        gate = net.linear(x, f"{self.prefix}.mlp.gate_proj")
        sigmoid = net.network.add_activation(gate, net.trt.ActivationType.SIGMOID).get_output(0)
        up = net.linear(x, f"{self.prefix}.mlp.up_proj")
        return net.linear(
            net.binary("PROD", net.binary("PROD", gate, sigmoid), up),
            f"{self.prefix}.mlp.down_proj",
        )

    def _heads(self, x: NetworkTensor, count: int) -> NetworkTensor:
        """``[T, count d]`` to ``[K, count / K, T, d]``; query head ``k H / K + g`` belongs to key
        head ``k``.
        """
        kv_heads, width = self.sizes.kv_heads, self.sizes.head_dim
        return self.net.reshape(
            x, (self.tokens, kv_heads, count // kv_heads, width), permuted=(1, 2, 0, 3)
        )

    def _online(self, x: NetworkTensor, count: int) -> NetworkTensor:
        """``x R3`` over ``[K, count / K, T, d]`` where keys of the prefix are rotated, as in a
        bundle with a quantized cache; else R3 would cancel.
        """
        name, sizes = f"{self.prefix}.self_attn", self.sizes
        if not (self.before and self.net.rotates(name)):
            return x
        flat = self.net.reshape(x, (-1, sizes.head_dim))
        shape = (sizes.kv_heads, count // sizes.kv_heads, self.tokens, sizes.head_dim)
        return self.net.reshape(self.net.rotate(flat, name), shape)

    def _behind_prefix(self, x: NetworkTensor, part: str) -> NetworkTensor:
        """Keys or values ``[K, 1, T, d]`` with the constant ones before them: ``[K, 1, p + T,
        d]``.
        """
        if not self.before:
            return x
        shape = (self.sizes.kv_heads, 1, self.before, self.sizes.head_dim)
        constant = self.net.constant(f"{self.prefix}.self_attn.prefix.{part}", shape)
        return self.net.concatenate([constant, x], axis=2)

    def _rope(self, x: NetworkTensor) -> NetworkTensor:
        """``x cos + x P sin`` where ``P`` takes ``(x1, x2)`` to ``(-x2, x1)``, from p on."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        net, width = self.net, self.sizes.head_dim
        source: Any = LlamaRotaryEmbedding(self.config)
        positions = self.before + np.arange(self.tokens)
        angles = np.outer(positions, source.inv_freq.double().numpy())
        angles = np.concatenate([angles, angles], axis=1)[None, None]
        half = width // 2
        turn = np.zeros((1, 1, width, width), np.float32)
        turn[0, 0, half + np.arange(half), np.arange(half)] = -1
        turn[0, 0, np.arange(half), half + np.arange(half)] = 1
        cosines, sines = (
            net.array((table * source.attention_scaling).astype(np.float32))
            for table in (np.cos(angles), np.sin(angles))
        )
        turned = net.matmul(x, net.array(turn))
        return net.binary("SUM", net.binary("PROD", x, cosines), net.binary("PROD", turned, sines))

    def _mask(self) -> npt.NDArray[np.float32]:
        """0 where a token sees another or the prefix, else a score that vanishes in the softmax;
        float32 ``[1, 1, T, p + T]``.
        """
        back = np.arange(self.tokens)[:, None] - np.arange(self.tokens)[None]
        window = sliding_window(self.config, self.layer) or self.tokens
        seen = np.pad(
            (back >= 0) & (back < window), ((0, 0), (self.before, 0)), constant_values=True
        )
        return np.where(seen, 0, _HIDDEN).astype(np.float32)[None, None]


def _strongly_typed(trt: ModuleType) -> int:
    """Flags of ``create_network``; newer TensorRT knows no other kind of network, and no flag for
    it.
    """
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)
