"""The ONNX backend's front: a :class:`~backends.base.Backend` that loads its heavy parts when they
are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backends.base import Fusion, Reason, Request, StoredTensor, WriteOptions
from backends.onnx.file_names import DATA_FILE, DATA_SHARDS, GENAI_DTYPES, GENAI_FILE, MODEL_FILE
from backends.onnx.target import Target
from backends.onnx.targets import TARGETS
from backends.rules import Limits

if TYPE_CHECKING:
    from torch import Tensor

    from backends.onnx.openvino_runner import OpenVinoModel
    from backends.onnx.runner import OnnxModel
    from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel


class OnnxBackend:
    """Writes ``model.onnx`` with external data, and runs it in the target's runtime or, without it,
    in ONNX Runtime.
    """

    name = "onnx"
    targets = tuple(TARGETS)
    contract = 4

    def refusals(self, request: Request) -> list[Reason]:
        """See :class:`~backends.base.Backend`. Online rotations are standard nodes, and logits of
        the last token alone a Gather: neither is refused.
        """
        reasons = _limits(TARGETS[request.target]).reasons(request)
        if request.config is not None:
            from backends.onnx.refusals import graph_refusal

            refusal = graph_refusal(request.config, request.linears)
            reasons += [] if refusal is None else [refusal]
        return reasons

    def compute_dtype(self, target: str) -> str:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].compute_dtype

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.write import write

        write(model, folder / MODEL_FILE, options)

    def files(self, request: Request, nbytes: int) -> Sequence[str]:
        """See :class:`~backends.base.ListsFiles`."""
        limit = request.max_shard_bytes
        data = DATA_FILE if limit is None or nbytes <= limit else DATA_SHARDS
        generating = TARGETS[request.target].compute_dtype in GENAI_DTYPES
        return (MODEL_FILE, data, *((GENAI_FILE,) if generating else ()))

    def load(self, folder: Path, target: str, *, exact: bool) -> OnnxModel | OpenVinoModel:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.runtimes import load

        return load(folder / MODEL_FILE, target, exact=exact)

    def load_probed(self, folder: Path, target: str) -> OnnxModel | OpenVinoModel:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.runtimes import load

        return load(folder / MODEL_FILE, target, exact=True, probed=True)

    def fusion(self, folder: Path, target: str) -> Fusion | None:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.runtimes import fusion

        return fusion(folder / MODEL_FILE, target)

    def read_linears(self, folder: Path, target: str) -> Mapping[str, QuantizedLinear]:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.read import read_linears

        return read_linears(folder / MODEL_FILE)

    def read_cache(self, folder: Path, target: str) -> QuantizedCache | None:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.read import read_cache

        return read_cache(folder / MODEL_FILE)

    def read_floats(self, folder: Path, target: str) -> Mapping[str, Tensor]:
        """See :class:`~backends.base.ReadsFloats`."""
        from backends.onnx.read import read_floats

        return read_floats(folder / MODEL_FILE)

    def contradictions(
        self, folder: Path, target: str, model: QuantizedModel
    ) -> Mapping[str, Sequence[str]]:
        """See :class:`~backends.base.ReadsMetadata`; the graph's own is read with its tensors."""
        if TARGETS[target].compute_dtype not in GENAI_DTYPES:
            return {}
        from backends.onnx.metadata import genai_contradictions

        return {GENAI_FILE: genai_contradictions(folder, model)}

    def load_unrounded(self, folder: Path, target: str) -> OnnxModel | None:
        """See :class:`~backends.base.LoadsUnrounded`."""
        from backends.onnx.runtimes import load_unrounded

        return load_unrounded(folder / MODEL_FILE, target)

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.contents import contents

        return contents(folder / MODEL_FILE)


def _limits(target: Target) -> Limits:
    options: dict[str, str | Mapping[object, str]] = {"dtype": target.dtypes}
    refused = target.shared_buffer_refusal()
    if refused is not None:
        options["kv_buffer"] = refused
    refused = target.int8_weights_refusal()
    if refused is not None:
        options["int8_weights"] = refused

    return Limits(
        linear=target.refusal, slow=target.warning, cache=target.cache_refusal, options=options
    )
