"""From artifact to ``model.onnx``: trace, lower, tidy, check, write."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from backends.base import Int8Weights, WriteOptions
from backends.onnx.attention import lower_attention
from backends.onnx.cache import quantize_cache
from backends.onnx.cache_length import leave_room
from backends.onnx.embeddings import lower_embeddings
from backends.onnx.experts import lower_experts, with_experts_apart
from backends.onnx.feeds import CACHE
from backends.onnx.file_names import GENAI_DTYPES
from backends.onnx.genai import write_genai_config
from backends.onnx.lower import lower
from backends.onnx.names import CACHE_METADATA_KEY, METADATA_KEY
from backends.onnx.nodes import size
from backends.onnx.prefix import move_positions
from backends.onnx.residual import fuse_residual_norms
from backends.onnx.rotary import fuse_rotary
from backends.onnx.save import save
from backends.onnx.shared_buffer import share_buffer
from backends.onnx.target import Target
from backends.onnx.targets import TARGETS
from backends.onnx.trace import TraceRequest, fill
from backends.onnx.trace_cache import cached_trace
from calib.architectures import wiring_of
from calib.artifact import QuantizedModel
from calib.process.progress import Progress, silent
from calib.schemes import tensor_scheme_to_dict


def write(model: QuantizedModel, path: Path, options: WriteOptions) -> None:
    """Write the graph to ``path``, its weights beside it, and what onnxruntime-genai wants to know
    of both.

    Raises:
        BackendError: the model cannot be traced, or the artifact lacks a linear.
    """
    target, progress = TARGETS[options.target], options.progress
    shared = options.kv_buffer == "shared"
    graph = build(
        model,
        target,
        last_logits=options.logits == "last",
        shared_buffer=shared,
        int8_weights=options.int8_weights,
        progress=progress,
    )
    save(graph, path, max_shard_bytes=options.max_shard_bytes, progress=progress)
    if target.compute_dtype in GENAI_DTYPES:
        write_genai_config(model, path.name, path.parent, _caches(graph), shared_buffer=shared)


def _caches(model: ir.Model) -> list[tuple[int, int]]:
    """Heads and width of the keys and values that ``model`` takes."""
    inputs = (value for value in model.graph.inputs if str(value.name).startswith(CACHE))
    return [(size(value, 1), size(value, 3)) for value in inputs]


def build(
    model: QuantizedModel,
    target: Target,
    *,
    last_logits: bool = False,
    shared_buffer: bool = False,
    int8_weights: Int8Weights = "auto",
    progress: Progress = silent,
) -> ir.Model:
    """The graph of ``model`` in memory, its large initializers still unread; the options are those
    of :class:`~backends.base.WriteOptions`.
    """
    request = TraceRequest(
        config=model.config,
        dtype=model.dtype,
        opset=target.opset,
        last_logits=last_logits,
        r3=model.rotations.of({"r3"}),
    )
    graph = cached_trace(request, progress)
    tables = [table.name for table in wiring_of(model.config).embeddings]
    if model.prefix is not None:
        move_positions(graph.graph, model.prefix)

    # placeholders become operators; experts first, for they hold linears that are placeholders too
    lower_experts(graph, model.config, routed=target.routed_experts)
    if target.rotary:
        fuse_rotary(graph)
    if model.cache is not None:
        quantize_cache(graph, model.cache)
    if shared_buffer:
        share_buffer(graph, single=model.prefix is None)
    elif target.counts_by_mask:
        leave_room(graph)
    lower_attention(graph, model.prefix, branches=target.branches)
    lower_embeddings(graph, model.linears, tables, integer_rows=target.integer_rows)

    # only now weights come in
    fill(graph, model.floats)
    lower(graph, with_experts_apart(model), target, int8_weights=int8_weights)
    if shared_buffer:
        fuse_residual_norms(graph)

    passes.RemoveUnusedNodesPass()(graph)
    passes.RemoveUnusedOpsetsPass()(graph)
    passes.TopologicalSortPass()(graph)
    # the experts of a layer share a rotation, and with it the names of its nodes
    passes.NameFixPass()(graph)
    passes.ClearMetadataAndDocStringPass()(graph)  # which rule rewrote what

    # what is no tensor, for whoever reads the graph back
    graph.graph.name = str(model.config["model_type"])
    graph.producer_name, graph.producer_version = "rotq", model.provenance.versions.get("rotq", "")
    entries = {name: linear.description() for name, linear in model.linears.items()}
    graph.metadata_props[METADATA_KEY] = json.dumps(entries)

    if model.cache is not None:
        cache = {
            "scheme": tensor_scheme_to_dict(model.cache.scheme),
            "layers": list(model.cache.key_scale),
        }
        graph.metadata_props[CACHE_METADATA_KEY] = json.dumps(cache)

    return graph
