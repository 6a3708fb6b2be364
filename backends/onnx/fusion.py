"""What ONNX Runtime makes of the graph: which linears became integer kernels."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx

from backends.base import Fusion
from backends.onnx.runner import open_session, read_proto, session_options

_WEIGHT_SUFFIX = "/DequantizeWeight"


def fusion(path: Path) -> Fusion:
    """Optimize the graph as a default session does, and look at what is left.

    A linear is unfused when a DequantizeLinear of its weight is still in the optimized graph: its weight is then turned
    into floats on every run.

    Raises:
        BackendError: ONNX Runtime cannot load the graph.
    """
    written = read_proto(path).graph
    weights = {
        node.input[0]: node.name.removesuffix(_WEIGHT_SUFFIX)
        for node in written.node
        if node.name.endswith(_WEIGHT_SUFFIX)
    }
    with tempfile.TemporaryDirectory() as scratch:
        optimized_path = Path(scratch) / "optimized.onnx"
        options = session_options(exact=False)
        options.optimized_model_filepath = str(optimized_path)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        open_session(str(path), options, path)
        optimized = onnx.load(optimized_path, load_external_data=False).graph
    left = {node.input[0] for node in optimized.node if node.op_type == "DequantizeLinear"}
    kernels = Counter(node.op_type for node in optimized.node)
    return Fusion(
        quantized=len(weights),
        unfused=[name for weight, name in weights.items() if weight in left],
        kernels=dict(kernels),
    )
