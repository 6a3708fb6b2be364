"""From artifact to ``model.onnx``: trace, lower, tidy, check, write."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from transformers import AutoConfig

from backends.onnx.lower import lower
from backends.onnx.trace import trace
from calib.architectures import architecture_for
from calib.artifact import QuantizedModel
from calib.errors import BackendError
from calib.progress import Progress

METADATA_KEY = "rotq.linears"
_INLINE_BYTES = 1024
"""Initializers up to this size stay in the ``.onnx`` file, where shape inference sees them; others are external."""


def write(model: QuantizedModel, path: Path, *, opset: int, progress: Progress) -> None:
    """Write ``path`` and ``path.data`` from the artifact.

    Raises:
        BackendError: the model cannot be traced, the artifact lacks a linear, or an embedding of it is quantized.
    """
    progress("trace", 0, 1)
    graph = build(model, opset=opset)
    progress("trace", 1, 1)

    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress("write", info.index + 1, info.total)

    ir.save(graph, path, external_data=f"{path.name}.data", size_threshold_bytes=_INLINE_BYTES, callback=report)
    onnx.checker.check_model(path)


def build(model: QuantizedModel, *, opset: int) -> ir.Model:
    """The graph of ``model`` in memory, its large initializers still unread."""
    config = AutoConfig.for_model(**model.config)
    architecture = architecture_for(config)
    experts = architecture.expert_parameters(config)
    if experts:
        raise BackendError(
            f"a mixture of experts ('{model.config['model_type']}') cannot be written as ONNX yet: torch.onnx does not "
            f"translate grouped experts such as '{experts[0]}'",
            hint="use a dense model",
        )
    tables = [table.name for table in architecture.embeddings if table.name in model.linears]
    if tables:
        raise BackendError(
            f"the quantized embedding '{tables[0]}' cannot be written as ONNX yet", hint="leave that override out"
        )
    widths = {name: linear.weight.shape[0] for name, linear in model.linears.items()}
    widths |= {name: model.floats[f"{name}.weight"].shape[0] for name in model.kept}
    open_keys = {f"{name}.{part}" for name in model.kept for part in ("weight", "bias")}
    floats = {key: tensor for key, tensor in model.floats.items() if key not in open_keys}
    graph = trace(model.config, floats, widths, opset=opset, r3=model.rotations.of({"r3"}))
    lower(graph, model)
    passes.RemoveUnusedNodesPass()(graph)
    passes.RemoveUnusedOpsetsPass()(graph)
    passes.TopologicalSortPass()(graph)
    for node in graph.graph:
        node.metadata_props.clear()  # the exporter's traces of Python source, which name paths of the machine it ran on
    for value in graph.graph.initializers.values():
        value.metadata_props.clear()
    graph.graph.name = str(model.config["model_type"])
    graph.producer_name, graph.producer_version = "rotq", model.provenance.versions.get("rotq", "")
    entries = {name: linear.description() for name, linear in model.linears.items()}
    graph.metadata_props[METADATA_KEY] = json.dumps(entries)
    return graph
