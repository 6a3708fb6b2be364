"""The ONNX backend's front: a :class:`~backends.base.Backend` that loads its heavy parts when they
are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import Fusion, StoredTensor, WriteOptions
from backends.onnx.targets import GENAI_FILE, TARGETS

if TYPE_CHECKING:
    from backends.onnx.openvino_runner import OpenVinoModel
    from backends.onnx.runner import OnnxModel
    from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
    from calib.schemes import LinearScheme, TensorScheme

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"


class OnnxBackend:
    """Writes ``model.onnx`` with external data, and runs it in the target's runtime or, without it,
    in ONNX Runtime.
    """

    name = "onnx"
    targets = tuple(TARGETS)

    def refusal(self, scheme: LinearScheme, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].refusal(scheme)

    def warning(self, scheme: LinearScheme, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].warning(scheme)

    def cache_refusal(self, scheme: TensorScheme, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].cache_refusal(scheme)

    def rotation_refusal(self, kind: str, target: str) -> str | None:
        """See :class:`~backends.base.Backend`; online rotations are standard nodes."""
        return None

    def logits_refusal(self, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return None

    def kv_buffer_refusal(self, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].shared_buffer

    def model_refusal(
        self, config: Mapping[str, Any], linears: Mapping[str, LinearScheme], target: str
    ) -> tuple[str, str] | None:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.refusals import graph_refusal

        return graph_refusal(config, linears)

    def compute_dtype(self, target: str) -> str:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].compute_dtype

    def files(
        self, options: WriteOptions, linears: Mapping[str, LinearScheme], nbytes: int
    ) -> Sequence[str]:
        """See :class:`~backends.base.Backend`."""
        limit = options.max_shard_bytes
        data = DATA_FILE if limit is None or nbytes <= limit else "model-*-of-*.onnx.data"
        generating = TARGETS[options.target].compute_dtype == "float32"
        return (MODEL_FILE, data, *((GENAI_FILE,) if generating else ()))

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.write import write

        write(model, folder / MODEL_FILE, options)

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

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.contents import contents

        return contents(folder / MODEL_FILE)
