"""What a runtime makes of the graph: which linears became integer kernels."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx

from backends.base import Fusion
from backends.onnx.files import read_proto
from backends.onnx.names import Label, linear_of, members
from backends.onnx.ort_options import session_options
from backends.onnx.runner import open_session
from calib.errors import BackendError

_UNWRITTEN = "Failed to write"
"""What ONNX Runtime says where it cannot write what it has optimized."""


def ort_fusion(path: Path) -> Fusion:
    """Optimize the graph as a default session of ONNX Runtime does, and look at what is left.

    A linear is unfused when a DequantizeLinear of its whole weight is still in the optimized graph:
    its weight is then turned into floats on every run. One that dequantizes the rows that a Gather
    took, as for an embedding, is not.

    Raises:
        BackendError: ONNX Runtime cannot load the graph.
    """
    written = read_proto(path).graph
    weights = _weights(written)

    with tempfile.TemporaryDirectory() as scratch:
        optimized_path = Path(scratch) / "optimized.onnx"
        options = session_options(exact=False)
        options.optimized_model_filepath = str(optimized_path)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimized.data"
        )
        try:
            open_session(str(path), options, path)
        except BackendError as error:
            if _UNWRITTEN not in error.message:
                raise
            raise BackendError(
                f"the graph that ONNX Runtime makes of '{path}' does not fit into the temporary"
                f" folder '{scratch}': the disk is full, or a limit (ulimit -f) is too low",
                hint="free some space there, or set TMPDIR to another folder",
            ) from error
        optimized = onnx.load(optimized_path, load_external_data=False).graph

    constants = {tensor.name for tensor in optimized.initializer}
    whole = [
        node
        for node in optimized.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    ]
    left = {linear_of(node.name, Label.DEQUANTIZE_WEIGHT) for node in whole} | {
        node.input[0] for node in whole
    }

    return Fusion(
        quantized=_count(weights),
        unfused=[
            each
            for name, weight in weights.items()
            if {name, weight} & left
            for each in members(name)
        ],
        kernels=dict(Counter(node.op_type for node in optimized.node)),
    )


def openvino_fusion(path: Path) -> Fusion:
    """Compile the graph as a default session of OpenVINO does, and look at what multiplies by
    integer weights.

    Raises:
        BackendError: OpenVINO cannot compile the graph.
    """
    from backends.onnx.openvino_runner import kernels

    graph = read_proto(path).graph
    weights = _weights(graph)
    multiplied = {
        linear_of(node.name, Label.MATMUL) for node in graph.node if node.op_type == "MatMul"
    }
    executed = kernels(path)
    fused = [names for _, integer, names in executed if integer]
    known = {
        part
        for names in fused
        for name in names
        # What is fused behind a product renames it, and a constant that was computed anew has lost
        # its name.
        for part in (name, name.partition("/")[0])
    }
    return Fusion(
        quantized=_count(weights),
        unfused=[
            name
            for name, weight in weights.items()
            if name in multiplied and not {name, weight} & known
        ],
        kernels=dict(Counter(kind for kind, _, _ in executed)),
    )


def _count(weights: Mapping[str, str]) -> int:
    return sum(len(members(name)) for name in weights)


def _weights(graph: onnx.GraphProto) -> Mapping[str, str]:
    """The value that each quantized linear, pack of linears or table dequantizes, by its name."""
    return {
        linear: node.input[0]
        for node in graph.node
        if (linear := linear_of(node.name, Label.DEQUANTIZE_WEIGHT)) is not None
    }
