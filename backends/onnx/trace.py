"""Tracing a causal LM whose linears, experts and attention are placeholders, without any weight in
memory.

Parameters that are left (embeddings, norms, routers) are traced as tensors of one element that is
seen at every index. In the graph they are initializers that have a name, a shape and a dtype, and
no values: :func:`fill` lets them read the artifact when they are written. Buffers such as rotary
frequencies are small constants of the graph.

An online R3 sits inside the attention, after RoPE and before the cache, so it is traced with the
model: a Reshape and a MatMul with a small constant for each Kronecker factor. Cached keys are
rotated, in ``past_key_values`` as in ``present``.

Inputs and outputs have the names that onnxruntime-genai and optimum know:

    input_ids [batch, sequence], attention_mask [batch, total], position_ids [batch, sequence],
    past_key_values.{i}.key|value [batch, kv_heads, past, head_dim]
        -> logits [batch, sequence or 1, vocabulary], present.{i}.key|value [batch, kv_heads, total,
        head_dim]
"""

from __future__ import annotations

import gc
import io
import logging
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, TextIO

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from backends.onnx.complex_rotary import real_rotary
from backends.onnx.frequencies import trace_frequencies
from backends.onnx.placeholders import open_up
from backends.onnx.row_tensor import RowTensor
from backends.onnx.untranslated import module_of, running
from calib.architectures import wiring_of
from calib.errors import BackendError, CheckpointError
from calib.modules.calling import taken
from calib.network.cache_layout import cache_layout
from calib.network.online import attach_online
from calib.network.skeleton import build_on_meta, fill_buffers
from calib.rotations.rotation_set import RotationSet

CHECKPOINT = "checkpoint"
"""Where initializers without values say that their data is: no file, but the artifact."""
_ROOT = "network"


@dataclass(frozen=True)
class TraceRequest:
    """All that a traced graph depends on, besides the versions of what traces it."""

    config: Mapping[str, Any]
    """Hugging Face config as a dictionary."""
    dtype: torch.dtype
    """Of the graph."""
    opset: int
    last_logits: bool = False
    """Multiply the output head with the last token of each row alone."""
    r3: RotationSet | None = None
    """Online rotations of queries and keys to put into the graph."""


class _FlatCache(nn.Module):
    """The model with its cache as a flat list of tensors, which is what a graph can have as inputs
    and outputs.
    """

    def __init__(self, network: nn.Module, *, last_logits: bool) -> None:
        super().__init__()
        self.network = network
        self.logits_to_keep = int(last_logits)  # 0 keeps all

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        given = {"position_ids": position_ids, "logits_to_keep": self.logits_to_keep}
        output = self.network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **taken(self.network, given),
        )
        # of all tokens, where the model cannot compute those of the last alone
        logits = output.logits[:, -1:] if self.logits_to_keep else output.logits
        present = [
            tensor
            for layer in output.past_key_values.layers
            for tensor in (layer.keys, layer.values)
        ]
        return (logits, *present)


def trace(request: TraceRequest) -> ir.Model:
    """Trace the model to an ONNX graph with placeholders, see :mod:`backends.onnx.placeholders`.

    Returns:
        A model whose float initializers have their checkpoint keys as names, and no values.

    Raises:
        BackendError: the exporter has no translation for something that the model does.
    """
    network = _network(request)
    weights = list(network.state_dict())
    wrapper = _FlatCache(network, last_logits=request.last_logits).eval()

    with torch.no_grad(), _quiet(), _uncollected(), real_rotary(network):
        inputs, names, dynamic = _example(network, request.dtype)
        layers = (len(names) - 3) // 2
        program = _export(
            wrapper,
            inputs,
            opset_version=request.opset,
            dynamic_shapes=dynamic,
            input_names=names,
            output_names=["logits", *_cache_names("present", layers)],
        )
        model = program.model
        _strip_weights(model, weights)
        onnxscript.optimizer.optimize(model)

    for value in model.graph.initializers.values():
        if value.const_value is None:
            value.const_value = _promised(value)

    _divide_by_roots(model.graph)
    for thing in (*model.graph, *model.graph.initializers.values()):
        # the exporter's traces of Python source, which name paths of this machine
        thing.metadata_props.clear()

    _name_output_axes(model)
    return model


def fill(model: ir.Model, floats: Mapping[str, Tensor]) -> None:
    """Let every initializer without values read them from ``floats`` when it is written.

    Args:
        model: a traced graph; changed in place.
        floats: parameters by checkpoint key, in the dtype of the graph.

    Raises:
        CheckpointError: a parameter is missing, or has another shape or dtype than the config says.
    """
    for name, value in model.graph.initializers.items():
        promised = value.const_value
        if not isinstance(promised, ir.ExternalTensor):
            continue

        tensor = floats.get(name)
        actual = "is missing" if tensor is None else f"is {tuple(tensor.shape)} {tensor.dtype}"
        expected = (tuple(promised.shape.numpy()), promised.dtype)

        if tensor is None or (tuple(tensor.shape), _ir_dtype(tensor.dtype)) != expected:
            raise CheckpointError(
                f"the weights do not fit the config: '{name}' {actual}, not {expected[0]}"
                f" {expected[1].name}",
                hint="the folder mixes files of two models, or was edited after it was written",
            )

        value.const_value = _lazy(tensor, promised)


def _lazy(tensor: Tensor, promised: ir.ExternalTensor) -> ir.LazyTensor:
    dtype, shape, name = promised.dtype, promised.shape, promised.name

    def read(start: int = 0, stop: int | None = None) -> ir.TensorProtocol:
        part = tensor[start:stop] if tensor.dim() else tensor
        return ir.tensor(part.contiguous(), dtype=dtype, name=name)

    if tensor.dim() == 2:
        return RowTensor(read, dtype=dtype, shape=shape, name=name, sources=[tensor])
    return ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)


def _network(request: TraceRequest) -> Any:
    """The model with placeholders, its remaining parameters one element each."""
    wiring = wiring_of(request.config)
    network = build_on_meta(wiring.config, request.dtype)
    open_up(network, wiring)
    if wiring.generic and wiring.architecture.experts is not None:
        # experts that no placeholder stands for: as products that do not depend on who chose whom
        network.set_experts_implementation("batched_mm")
    fill_buffers(network)
    trace_frequencies(network)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(_stand_in(parameter), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # it is in the checkpoint
                setattr(module, name, _stand_in(buffer))
    if request.r3:
        attach_online(network, wiring, request.r3)
    return network.eval()


def _stand_in(tensor: Tensor) -> Tensor:
    """Of all strides zero: one element in memory, whatever the shape."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _export(
    wrapper: nn.Module, inputs: tuple[Tensor, ...], **options: Any
) -> torch.onnx.ONNXProgram:
    with running(wrapper) as modules:
        try:
            # Unoptimized: constant folding would take the stand-ins for the weights.
            program = torch.onnx.export(
                wrapper, inputs, dynamo=True, optimize=False, verbose=False, **options
            )
        except torch.onnx.errors.OnnxExporterError as error:
            where = modules.culprit() or _untranslated(
                error, wrapper, inputs, options["dynamic_shapes"]
            )
            raise _refusal(error, where) from error

    if program is None:  # the exporter's signature allows it; with dynamo=True it does not happen
        raise BackendError("torch.onnx returned no program")

    return program


def _untranslated(
    error: BaseException, wrapper: nn.Module, inputs: tuple[Tensor, ...], dynamic: tuple[Any, ...]
) -> str | None:
    """The module of the operator that stopped the translation. The exporter's errors do not tell:
    trace once more.
    """
    auto = torch.export.Dim.AUTO
    shapes = [dict.fromkeys(axes, auto) for axes in (*dynamic[:3], *dynamic[3])]
    program = torch.export.export(wrapper, inputs, dynamic_shapes=(*shapes[:3], tuple(shapes[3:])))
    return module_of(error, program)


def _refusal(error: BaseException, where: str | None) -> BackendError:
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    if isinstance(root, BackendError):
        return root

    reason = " ".join(str(root).strip().split("\n\n")[0].split())
    if "data-dependent" in reason:
        reason = "what it does next depends on values, which a graph only has when it runs"
    module = f"'{where.removeprefix(f'{_ROOT}.')}'" if where else "the model"

    return BackendError(
        f"torch.onnx cannot export {module}: {reason}",
        hint=(
            "use the safetensors backend, which does not trace the model; -v shows the exporter's"
            " own report"
        ),
    )


def _strip_weights(model: ir.Model, weights: Collection[str]) -> None:
    """Give weights their checkpoint keys back, which the trace saw below the wrapper, and take the
    stand-ins away.
    """
    names = {f"{_ROOT}.{name}": name for name in weights}
    for value in list(model.graph.initializers.values()):
        if value.name in names:
            value.name = names[value.name]
            value.const_value = None


def _divide_by_roots(graph: ir.Graph) -> None:
    """``x * (1 / sqrt(v))`` of norms becomes ``x / sqrt(v)``, which ONNX Runtime recognises as a
    norm and fuses.
    """
    for node in list(graph):
        root = node.inputs[0] if node.op_type == "Reciprocal" else None
        producer = None if root is None else root.producer()
        if producer is None or producer.op_type != "Sqrt":
            continue

        inverse = node.outputs[0]
        for user in list(inverse.consumers()):
            if user.op_type != "Mul":
                continue

            factor = user.inputs[1] if user.inputs[0] is inverse else user.inputs[0]
            quotient = ir.node("Div", [factor, root], name=user.name)
            graph.insert_before(user, quotient)

            # the quotient takes over the place of the product
            output, old = quotient.outputs[0], user.outputs[0]
            output.shape, output.type, output.name = old.shape, old.type, old.name
            ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
            graph.remove(user, safe=True)

        if not inverse.uses():
            graph.remove(node, safe=True)


def _promised(value: ir.Value) -> ir.ExternalTensor:
    """The initializer ``value`` with dtype and shape, and data that is not in the graph."""
    assert value.name is not None  # the trace knows all three
    assert value.dtype is not None
    assert value.shape is not None
    return ir.ExternalTensor(CHECKPOINT, 0, 0, value.dtype, shape=value.shape, name=value.name)


def _ir_dtype(dtype: torch.dtype) -> ir.DataType:
    return ir.tensor(torch.zeros((), dtype=dtype)).dtype


def _example(
    network: nn.Module, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], list[str], tuple[Any, ...]]:
    """Example inputs, their names and their dynamic axes. Dynamic sizes differ and exceed 1: none
    is specialised.
    """
    layout = cache_layout(network)
    batch, sequence, past = 2, 3, 5

    # the cache holds tokens already, so that every axis is seen to have a size of its own
    ids = torch.zeros(batch, sequence, dtype=torch.long)
    mask = torch.ones(batch, past + sequence, dtype=torch.long)
    positions = torch.arange(past, past + sequence).repeat(batch, 1)
    cache = tuple(
        torch.zeros(batch, heads, past, width, dtype=dtype)
        for layer in layout
        for heads, width in (layer.key, layer.value)
    )

    tokens, cached = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    dynamic = (tokens, {0: "batch", 1: "total"}, tokens, (cached,) * len(cache))
    names = [
        "input_ids",
        "attention_mask",
        "position_ids",
        *_cache_names("past_key_values", len(layout)),
    ]

    return (ids, mask, positions, *cache), names, dynamic


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _name_output_axes(model: ir.Model) -> None:
    """Call the grown cache axis ``total``, as in the attention mask; the exporter writes ``past +
    sequence``.
    """
    for output in model.graph.outputs:
        if (
            output.name is not None
            and output.name.startswith("present.")
            and output.shape is not None
        ):
            output.shape = ir.Shape([output.shape[0], output.shape[1], "total", output.shape[3]])


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cycles, which goes through a trace's many small objects again and
    again, and through all others of the process.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on packages, axis names and initializers without values, and
    what torch prints of a program that it cannot trace, unless debugging.
    """
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        yield
        return
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)

    try:
        with warnings.catch_warnings(), redirect_stderr(_OfOtherThreads(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _OfOtherThreads(io.TextIOBase):
    """A stream that drops what this thread writes, and hands on what others do, such as a progress
    bar.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        """As for any stream; the number of characters."""
        if threading.get_ident() != self._thread:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As for any stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether what others write comes to a terminal."""
        return self._stream.isatty()
