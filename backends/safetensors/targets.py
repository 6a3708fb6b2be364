"""What each safetensors target expresses, and where its layout is. Torch-free, for ``rotq
backends``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.rules import Limits
from backends.safetensors.compressed_tensors.limits import LIMITS as COMPRESSED_TENSORS_LIMITS
from backends.safetensors.file_names import QUANT_CONFIG_FILE, STATEMENT_FILE
from backends.safetensors.modelopt.limits import LIMITS as MODELOPT_LIMITS
from backends.safetensors.tensorrt.limits import LIMITS as TENSORRT_LIMITS
from backends.safetensors.tripy.limits import LIMITS as TRIPY_LIMITS

if TYPE_CHECKING:
    from backends.base import RuntimeModel
    from backends.safetensors.layout import Layout

_PACKAGE = "backends.safetensors"


@dataclass(frozen=True)
class Target:
    """A key layout, and the runtime it is for."""

    limits: Limits
    module: str
    """Subpackage of the layout."""
    layout_class: str
    files: tuple[str, ...] = ()
    """What is written besides weights, index, manifest and what every export has."""
    quantized_files: tuple[str, ...] = ()
    """The same, only where something is quantized."""
    has_runner: bool = False
    """Whether the subpackage's ``runner.load`` runs a bundle in a library of the target's own."""

    def layout(self) -> Layout:
        """The layout; imports torch."""
        layout: Layout = getattr(self._load("layout"), self.layout_class)()
        return layout

    def run(self, folder: Path, *, exact: bool) -> RuntimeModel:
        """The bundle in ``folder`` in the target's own library.

        Raises:
            RuntimeMissing: it is not installed, or cannot run what the bundle holds.
        """
        model: RuntimeModel = self._load("runner").load(folder, exact=exact)
        return model

    def _load(self, name: str) -> Any:
        return import_module(f"{_PACKAGE}.{self.module}.{name}")


TARGETS: Mapping[str, Target] = {
    "tripy": Target(TRIPY_LIMITS, "tripy", "TripyLayout", files=(STATEMENT_FILE,)),
    "tensorrt": Target(TENSORRT_LIMITS, "tensorrt", "TensorRTLayout"),
    "modelopt": Target(
        MODELOPT_LIMITS, "modelopt", "ModelOptLayout", quantized_files=(QUANT_CONFIG_FILE,)
    ),
    "compressed-tensors": Target(
        COMPRESSED_TENSORS_LIMITS,
        "compressed_tensors",
        "CompressedTensorsLayout",
        has_runner=True,
    ),
}
