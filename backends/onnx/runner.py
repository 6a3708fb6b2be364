"""Running an exported graph in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # its stubs are a package of their own
from torch import Tensor

from calib.errors import BackendError

_CACHE = "past_key_values."


class OnnxModel:
    """An exported folder in ONNX Runtime; implements :class:`~backends.base.RuntimeModel` and ``ProbedModel``.

    Args:
        path: the ``.onnx`` file; its external data lies beside it.
        exact: forbid ONNX Runtime's own approximation of weight-only linears (MatMulNBits at accuracy level 4 quantizes
            activations to int8); ``False``: the session as a user gets it.
        probed: make inputs and outputs of all linears readable through :meth:`probe`.

    Raises:
        BackendError: the file or its external data is missing, damaged or refused by ONNX Runtime.
    """

    def __init__(self, path: Path, *, exact: bool, probed: bool = False) -> None:
        options = session_options(exact=exact)
        self._taps = _tap_outputs(path) if probed else {}
        source: str | bytes = str(path)
        if probed:
            source = _with_outputs(path, [name for pair in self._taps.values() for name in pair])
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        self.runtime = f"ONNX Runtime {ort.__version__} (CPU)"
        self._session = open_session(source, options, path)
        self._inputs = self._session.get_inputs()
        self._outputs = [output.name for output in self._session.get_outputs() if output.name not in _flat(self._taps)]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`~backends.base.RuntimeModel`."""
        feeds = self._feeds(input_ids, attention_mask, position_ids, past)
        logits, *present = (torch.from_numpy(array) for array in self._session.run(self._outputs, feeds))
        return logits.float(), present

    def probe(self, input_ids: Tensor, names: Sequence[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """See :class:`~backends.base.ProbedModel`."""
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        feeds = self._feeds(input_ids, torch.ones_like(input_ids), positions, None)
        wanted = [tap for name in names for tap in self._taps[name]]
        found = dict(zip(wanted, self._session.run(wanted, feeds), strict=True))
        return {
            name: (torch.from_numpy(found[tap[0]]), torch.from_numpy(found[tap[1]]))
            for name in names
            for tap in [self._taps[name]]
        }

    def _feeds(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor] | None
    ) -> dict[str, np.ndarray]:
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        caches = [entry for entry in self._inputs if entry.name.startswith(_CACHE)]
        if past is None:
            past = [_empty_cache(entry, input_ids.shape[0]) for entry in caches]
        feeds |= {entry.name: tensor for entry, tensor in zip(caches, past, strict=True)}
        return {name: tensor.contiguous().numpy() for name, tensor in feeds.items()}


def session_options(*, exact: bool) -> ort.SessionOptions:
    """Options of a quiet CPU session, in exact or in default arithmetic."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def read_proto(path: Path) -> onnx.ModelProto:
    """The graph file at ``path`` without its external data.

    Raises:
        BackendError: it is missing, or no ONNX file.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise _unreadable(path, str(error)) from error


def open_session(source: str | bytes, options: ort.SessionOptions, path: Path) -> ort.InferenceSession:
    """A CPU session over ``source``, a path or a serialized model that was read from ``path``.

    Raises:
        BackendError: ONNX Runtime cannot load it.
    """
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, reason: str) -> BackendError:
    return BackendError(
        f"ONNX Runtime cannot load '{path}': {' '.join(reason.split())}",
        hint="the file or its .data file is missing, damaged or edited",
    )


def _empty_cache(entry: ort.NodeArg, batch: int) -> Tensor:
    dtype = torch.float16 if entry.type == "tensor(float16)" else torch.float32
    return torch.zeros(batch, entry.shape[1], 0, entry.shape[3], dtype=dtype)


def _tap_outputs(path: Path) -> dict[str, tuple[str, str]]:
    """For each linear, the value that enters its quantizer (or its MatMul) and the value that leaves it."""
    graph = read_proto(path).graph
    producers = {name: node for node in graph.node for name in node.output}
    named = {node.name: node for node in graph.node}
    taps: dict[str, tuple[str, str]] = {}
    for node in graph.node:
        if node.op_type != "MatMul" or not node.name.endswith("/MatMul") or "/Factor" in node.name:
            continue
        module = node.name.removesuffix("/MatMul")
        entering = node.input[0]
        if f"{module}/Order" in named:
            entering = named[f"{module}/Order"].input[0]
        dequantize = producers.get(entering)
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            entering = producers[dequantize.input[0]].input[0]
        last = named.get(f"{module}/Add", node)
        taps[module] = (entering, last.output[0])
    return taps


def _with_outputs(path: Path, names: Sequence[str]) -> bytes:
    """The graph with further values as outputs, serialized without its external data."""
    model = read_proto(path)
    known = {output.name for output in model.graph.output}
    for name in dict.fromkeys(names):
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    serialized: bytes = model.SerializeToString()
    return serialized


def _flat(taps: Mapping[str, tuple[str, str]]) -> set[str]:
    return {name for pair in taps.values() for name in pair} - {"logits"}
