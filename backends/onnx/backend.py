"""The ONNX backend's front: a :class:`~backends.base.Backend` that loads its heavy parts when they are used."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import Fusion, StoredTensor, WriteOptions
from backends.onnx.targets import TARGETS

if TYPE_CHECKING:
    from backends.onnx.runner import OnnxModel
    from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
    from calib.schemes import LinearScheme, TensorScheme

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"


class OnnxBackend:
    """Writes ``model.onnx`` with external data, and runs it in ONNX Runtime."""

    name = "onnx"
    targets = tuple(TARGETS)

    def refusal(self, scheme: LinearScheme, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].refusal(scheme)

    def warning(self, scheme: LinearScheme, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return None

    def cache_refusal(self, scheme: TensorScheme, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return "the graph's cache is in float"

    def model_refusal(self, config: Mapping[str, Any], linears: Collection[str], target: str) -> tuple[str, str] | None:
        """See :class:`~backends.base.Backend`."""
        return None

    def compute_dtype(self, target: str) -> str:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].compute_dtype

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.write import write

        write(model, folder / MODEL_FILE, opset=TARGETS[options.target].opset, progress=options.progress)

    def load(self, folder: Path, target: str, *, exact: bool) -> OnnxModel:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.runner import OnnxModel

        return OnnxModel(folder / MODEL_FILE, exact=exact)

    def load_probed(self, folder: Path, target: str) -> OnnxModel:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.runner import OnnxModel

        return OnnxModel(folder / MODEL_FILE, exact=True, probed=True)

    def fusion(self, folder: Path, target: str) -> Fusion:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.fusion import fusion

        return fusion(folder / MODEL_FILE)

    def read_linears(self, folder: Path, target: str) -> Mapping[str, QuantizedLinear]:
        """See :class:`~backends.base.Backend`."""
        from backends.onnx.read import read_linears

        return read_linears(folder / MODEL_FILE)

    def read_cache(self, folder: Path, target: str) -> QuantizedCache | None:
        """See :class:`~backends.base.Backend`."""
        return None

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        """See :class:`~backends.base.Backend`."""
        raise NotImplementedError
