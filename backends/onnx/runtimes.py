"""What runs a written graph on this machine: the runtime it is for, or the nearest thing to it that
is there.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from backends.base import Fusion, RuntimeMissing
from backends.onnx.files import read_proto
from backends.onnx.fusion import openvino_fusion, ort_fusion
from backends.onnx.runner import OnnxModel
from backends.onnx.unrounded import rounds_inputs_only

if TYPE_CHECKING:
    from backends.onnx.openvino_runner import OpenVinoModel

ORT, OPENVINO, TENSORRT = "ort", "openvino", "tensorrt"
_STANDARD = frozenset({"", "ai.onnx", "com.microsoft"})
"""Domains of operators that ONNX Runtime's CPU provider knows."""
_FLOAT4 = "FLOAT4E2M1"
_STANDS_IN = {OPENVINO: "OpenVINO is not installed", TENSORRT: "TensorRT runs on GPUs only"}
"""Why ONNX Runtime stands in."""


def load(
    path: Path, target: str, *, exact: bool, probed: bool = False
) -> OnnxModel | OpenVinoModel:
    """The graph at ``path`` in what runs it here.

    OpenVINO's folders run in ONNX Runtime where it is not installed. TensorRT's do so as well, as
    it has no CPU: what they compute is right to the precision of float16, and how fast it is says
    nothing.

    Raises:
        RuntimeMissing: the graph holds what only TensorRT runs.
        BackendError: the file or its data is missing, damaged or refused.
    """
    if target == OPENVINO and openvino_is_installed():
        from backends.onnx.openvino_runner import OpenVinoModel

        return OpenVinoModel(path, exact=exact, probed=probed)
    if target == TENSORRT:
        _check_runs_without_tensorrt(path)
    return OnnxModel(
        path, exact=exact or target == TENSORRT, probed=probed, stands_in=_STANDS_IN.get(target, "")
    )


def load_unrounded(path: Path, target: str) -> OnnxModel | None:
    """The graph at ``path`` in ONNX Runtime without the rounding of what enters its linears;
    ``None`` where another runtime is at hand, or it rounds something else.

    Raises:
        BackendError: the file or its data is missing, damaged or refused.
    """
    if target != ORT or not rounds_inputs_only(read_proto(path).graph):
        return None
    return OnnxModel(path, exact=True, unrounded=True)


def fusion(path: Path, target: str) -> Fusion | None:
    """How the runtime of ``target`` executes the linears; ``None`` where it is not there to tell.

    Raises:
        BackendError: the file or its data is missing, damaged or refused.
    """
    if target == ORT:
        return ort_fusion(path)
    if target == OPENVINO and openvino_is_installed():
        return openvino_fusion(path)
    read_proto(path)
    return None


def openvino_is_installed() -> bool:
    """Whether this machine can run OpenVINO."""
    return find_spec("openvino") is not None


def _check_runs_without_tensorrt(path: Path) -> None:
    graph = read_proto(path).graph
    foreign = next((node for node in graph.node if node.domain not in _STANDARD), None)
    if foreign is not None:
        raise _missing(path, f"the operator {foreign.domain}::{foreign.op_type}")
    if any(
        onnx.TensorProto.DataType.Name(tensor.data_type) == _FLOAT4 for tensor in graph.initializer
    ):
        raise _missing(path, "4-bit floats")
    if any(
        entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT8E4M3FN for entry in graph.input
    ):
        raise _missing(path, "a cache of float8")  # ONNX Runtime concatenates none


def _missing(path: Path, what: str) -> RuntimeMissing:
    return RuntimeMissing(
        f"'{path}' holds {what}, which only TensorRT runs, on a GPU",
        hint="run it there; `rotq inspect` shows what it holds",
    )
