"""Running an exported graph in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from backends.onnx.feeds import cache_inputs, feeds, whole_row
from backends.onnx.files import follow_links, read_proto, unreadable
from backends.onnx.names import Label, linear_of
from backends.onnx.ort_options import ACCURACY_LEVEL, EXACT, session_options
from backends.onnx.taps import taps
from backends.onnx.targets import ASKED_ORT, ort_clips
from backends.onnx.unrounded import without_rounding
from calib.schemes import INT4, INT8, LinearScheme, PerBlock, TensorScheme

_APPROXIMATION = (
    "quantizes what enters weight-only linears to int8 in blocks (MatMulNBits at accuracy level 4)"
)
_WEIGHT_ONLY = tuple(LinearScheme(TensorScheme(fmt, PerBlock(32)), None) for fmt in (INT4, INT8))
"""Linears by which a default session shows whether it does so on this CPU."""
_ROUNDED = 1e-4
"""Relative L2 of a default session against an exact one from which on it rounds inputs: floats
summed in another order differ by 1e-6 at most, inputs in int8 by 2e-3 and more (measured 2e-3 to
8e-3)."""


class OnnxModel:
    """An exported folder in ONNX Runtime; implements ``RuntimeModel``, ``DescribedModel`` and
    ``ProbedModel`` of :mod:`backends.base`.

    Args:
        path: the ``.onnx`` file; its external data lies beside it.
        exact: forbid ONNX Runtime's own approximation of weight-only linears (MatMulNBits at
            accuracy level 4 quantizes activations to int8); ``False``: the session as a user gets
            it.
        probed: make inputs and outputs of all linears readable through :meth:`probe`.
        unrounded: leave out the rounding of what enters linears
            (:mod:`backends.onnx.unrounded`).
        stands_in: why ONNX Runtime runs what is another runtime's, for :attr:`runtime`; empty where
            it is its own. It then does not optimize what it would fail to load (its kernels
            quantize and dequantize float8, and its optimizer makes linears of them for which there
            are none), nor what it would not compute exactly on this CPU.

    Raises:
        BackendError: the file or its external data is missing, damaged or refused by ONNX Runtime.
    """

    precision = "float32"
    """Of the CPU provider, which casts what a graph has in float16."""

    def __init__(
        self,
        path: Path,
        *,
        exact: bool,
        probed: bool = False,
        unrounded: bool = False,
        stands_in: str = "",
    ) -> None:
        proto = read_proto(path)
        found = taps(proto.graph)
        as_written = bool(stands_in) and (uses_float8(proto.graph) or bool(ort_clips()))
        options = session_options(exact=exact, as_written=as_written)
        approximated = any(tap.quantized and tap.multiplies_floats for tap in found.values())
        self.runtime = f"ONNX Runtime {ort.__version__} (CPU)" + (
            f"; {stands_in}" if stands_in else ""
        )
        self.note = (
            _APPROXIMATION if approximated and not (exact or as_written) and approximates() else ""
        )
        self._taps = found if probed else {}
        self._caches = cache_inputs(proto.graph)
        self._outputs = [output.name for output in proto.graph.output]
        source: str | bytes = str(path)
        if unrounded:
            without_rounding(proto.graph)
        if probed or unrounded:
            folders = set(follow_links(path, proto).values()) or {path.parent}
            if len(folders) > 1:
                raise unreadable(path, "its data leads to several folders")
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(folders.pop())
            )
            source = _with_outputs(
                proto,
                [name for tap in self._taps.values() for name in (tap.entering, tap.leaving)],
            )
        self._session = open_session(source, options, path)
        self.session = _settings(
            self._session, exact=exact, sums=_sums(proto.graph, as_written=as_written)
        )

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
        wanted = list(dict.fromkeys(end for name in names for end in self._ends(name)))
        found = dict(
            zip(
                wanted,
                self._run(wanted, feeds(self._caches, *whole_row(input_ids), None)),
                strict=True,
            )
        )
        return {
            name: (found[entering], found[leaving])
            for name in names
            for entering, leaving in [self._ends(name)]
        }

    def _ends(self, name: str) -> tuple[str, str]:
        tap = self._taps[name]
        return tap.entering, tap.leaving

    def _run(self, outputs: Sequence[str], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        if not outputs:  # which ONNX Runtime takes to mean all
            return []
        found = self._session.run(
            list(outputs), {name: tensor.numpy() for name, tensor in inputs.items()}
        )
        return [torch.from_numpy(array) for array in found]


def approximates() -> bool:
    """Whether a default session rounds the inputs of weight-only linears on this CPU: it is asked,
    once.
    """
    answers = [ASKED_ORT.about(scheme) for scheme in _WEIGHT_ONLY]
    return any(answer is None or answer.approximation > _ROUNDED for answer in answers)


def _settings(session: ort.InferenceSession, *, exact: bool, sums: str) -> dict[str, str]:
    """What a session says of itself, and of the kernels that it has on this CPU."""
    threads = session.get_session_options().intra_op_num_threads
    asked = [answer.level for answer in map(ASKED_ORT.about, _WEIGHT_ONLY) if answer is not None]
    level = EXACT[ACCURACY_LEVEL] if exact else " and ".join(map(str, sorted(set(asked))))
    return {
        "providers": " ".join(session.get_providers()),
        "intra_op_num_threads": str(threads or "one a core"),
        "MatMulNBits accuracy_level": level or "not asked",
        "sums of int8 products": sums,
    }


def _sums(graph: onnx.GraphProto, *, as_written: bool) -> str:
    """What a session on this CPU makes of sums of products of int8."""
    if as_written:
        return "floats"
    unsigned = {
        node.input[0]
        for node in graph.node
        if linear_of(node.name, Label.DEQUANTIZE_WEIGHT) is not None
    } & {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.UINT8}
    if unsigned:
        return "exact, of weights stored in uint8"
    clips = ort_clips()
    return "not asked" if clips is None else "clipped to 16 bits" if clips else "exact"


def open_session(
    source: str | bytes, options: ort.SessionOptions, path: Path
) -> ort.InferenceSession:
    """A CPU session over ``source``, a path or a serialized model that was read from ``path``.

    Raises:
        BackendError: ONNX Runtime cannot load it.
    """
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise unreadable(path, f"ONNX Runtime {ort.__version__}: {error}") from error


def uses_float8(graph: onnx.GraphProto) -> bool:
    """Whether any weight or zero point of the graph is float8."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN for tensor in graph.initializer)


def _with_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> bytes:
    """The graph with further values as outputs, serialized without its external data. ``proto`` is
    used up.
    """
    known = {output.name for output in proto.graph.output}
    for name in dict.fromkeys(names):
        if name not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    serialized: bytes = proto.SerializeToString()
    return serialized
