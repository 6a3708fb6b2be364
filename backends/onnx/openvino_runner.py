"""Running an exported graph in OpenVINO on the CPU. Imported only where OpenVINO is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import Tensor

from backends.onnx import openvino_options as options
from backends.onnx.feeds import cache_inputs, feeds, whole_row
from backends.onnx.files import read_proto, unreadable
from backends.onnx.taps import taps

_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
"""torch's names of the precisions that OpenVINO's CPU plugin computes in; another (``dynamic``) is
that of the file.
"""
_APPROXIMATION = (
    "quantizes what enters weight-only linears to int8 in groups of {groups} (dynamic quantization)"
)
_INTEGERS = frozenset({"i8", "u8", "i4", "u4"})
_KERNELS = frozenset({"FullyConnected", "MatMul"})
_PREAMBLE = ("Exception from", "Check '", "FrontEnd API", "Model wasn't")
"""How lines of OpenVINO's reports begin that do not say what is wrong."""


class OpenVinoModel:
    """An exported folder in OpenVINO; implements ``RuntimeModel``, ``DescribedModel`` and
    ``ProbedModel`` of :mod:`backends.base`.

    Args:
        path: the ``.onnx`` file; its external data lies beside it.
        exact: arithmetic as written; ``False``: the compiled model as a user gets it.
        probed: make inputs and outputs of all linears readable through :meth:`probe`.

    Raises:
        BackendError: the file or its external data is missing, damaged or refused by OpenVINO.
    """

    def __init__(self, path: Path, *, exact: bool, probed: bool = False) -> None:
        graph = read_proto(path).graph
        found = taps(graph)
        self.runtime = f"OpenVINO {options.version()} ({options.DEVICE})"
        self._taps = found if probed else {}
        self._caches = cache_inputs(graph)
        self._outputs = [output.name for output in graph.output]
        ends = [end for tap in self._taps.values() for end in (tap.entering, tap.leaving)]
        self._compiled = compile_graph(
            path, options.AS_WRITTEN if exact else options.AS_A_USER, [*ends]
        )
        self.session = options.settings(self._compiled)
        self.precision = _DTYPES.get(self.session["INFERENCE_PRECISION_HINT"], "float32")
        weight_only = any(tap.quantized and tap.multiplies_floats for tap in found.values())
        groups = int(self.session["DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        self.note = _APPROXIMATION.format(groups=groups) if weight_only and groups else ""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`~backends.base.RuntimeModel`."""
        logits, *present = self._run(
            self._outputs, feeds(self._caches, input_ids, attention_mask, position_ids, past)
        )
        return logits.float(), present

    def probe(self, input_ids: Tensor, names: Sequence[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """See :class:`~backends.base.ProbedModel`."""
        ends = {name: (self._taps[name].entering, self._taps[name].leaving) for name in names}
        wanted = list(dict.fromkeys(end for pair in ends.values() for end in pair))
        found = dict(
            zip(
                wanted,
                self._run(wanted, feeds(self._caches, *whole_row(input_ids), None)),
                strict=True,
            )
        )
        return {
            name: (found[entering], found[leaving]) for name, (entering, leaving) in ends.items()
        }

    def _run(self, outputs: Sequence[str], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        results = self._compiled(
            {name: tensor.numpy() for name, tensor in inputs.items()}, share_outputs=False
        )
        return [torch.from_numpy(results[name]) for name in outputs]


def compile_graph(path: Path, properties: Mapping[str, str], outputs: Sequence[str] = ()) -> Any:
    """The graph at ``path`` compiled for the CPU, with the values ``outputs`` readable besides its
    own.

    Raises:
        BackendError: OpenVINO refuses it.
    """
    try:
        model = ov.Core().read_model(path)
        known = {name for output in model.outputs for name in output.get_names()}
        model.add_outputs([name for name in dict.fromkeys(outputs) if name not in known])
        return ov.Core().compile_model(model, options.DEVICE, dict(properties))
    except RuntimeError as error:
        raise unreadable(path, f"OpenVINO {options.version()}: {_cause(str(error))}") from error


def _cause(report: str) -> str:
    """The part of OpenVINO's many-lined report that says what it does not take."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    told = [
        line
        for line in lines
        if not line.startswith(("Exception from", "Check '", "FrontEnd API", "Model wasn't"))
    ]
    return " ".join(told or lines)


def kernels(path: Path) -> list[tuple[str, bool, frozenset[str]]]:
    """The operators that a default session really executes.

    Returns:
        For each, its type and the precision it runs in, as ``FullyConnected i8``; whether it
        multiplies by integer weights; and the names by which its weights and itself may be known in
        the graph.
    """
    found = []
    for op in compile_graph(path, options.AS_A_USER).get_runtime_model().get_ops():
        about = _about(op)
        kind = about["layerType"]
        if kind not in _KERNELS:
            found.append((kind, False, frozenset[str]()))
            continue
        weight = op.input(1)
        integer = weight.get_element_type().get_type_name() in _INTEGERS
        found.append(
            (f"{kind} {about['runtimePrecision']}", integer, frozenset(_names_behind(op, weight)))
        )
    return found


def _about(op: ov.Node) -> dict[str, str]:
    info = op.get_rt_info()
    return {key: str(info[key].value) for key in ("layerType", "runtimePrecision")}


def _names_behind(op: ov.Node, weight: ov.Input) -> list[str]:
    """Names of ``op`` and of all that lies between it and the constant that is its weight."""
    names = [op.get_friendly_name()]
    node = weight.get_source_output().get_node()
    while True:
        names.append(node.get_friendly_name())
        if not node.inputs():
            return names
        node = node.input(0).get_source_output().get_node()
