"""What each safetensors target expresses, and where its layout is. Torch-free, for ``rotq
backends``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.rules import Rule, first_reason
from backends.safetensors.compressed_tensors import rules as compressed_tensors
from backends.safetensors.modelopt import rules as modelopt
from backends.safetensors.tensorrt import rules as tensorrt
from backends.safetensors.tripy import rules as tripy
from calib.schemes import LinearScheme, TensorScheme

if TYPE_CHECKING:
    from backends.base import RuntimeModel
    from backends.safetensors.layout import Layout

_PACKAGE = "backends.safetensors"


@dataclass(frozen=True)
class Target:
    """A key layout, and the runtime it is for."""

    rules: tuple[Rule, ...]
    """What it cannot express; the first that applies is the reason."""
    warnings: tuple[Rule, ...]
    """What it expresses at a price."""
    cache_refusal: Callable[[TensorScheme], str | None]
    module: str
    """Subpackage of the layout."""
    layout_class: str
    has_runner: bool = False
    """Whether the subpackage's ``runner.load`` runs a bundle in a library of the target's own."""
    files: tuple[str, ...] = ()
    """What the layout writes besides tensors."""
    quantized_files: tuple[str, ...] = ()
    """What it also writes where something is quantized."""
    rotation_refusal: Callable[[str], str | None] = lambda kind: None
    """Why it cannot express rotations of a kind; by default it can express all."""

    def refusal(self, scheme: LinearScheme) -> str | None:
        """Why this target cannot express a linear of ``scheme``; ``None`` if it can."""
        return first_reason(self.rules, scheme)

    def warning(self, scheme: LinearScheme) -> str | None:
        """What a linear of ``scheme`` costs on this target; ``None`` if nothing."""
        return first_reason(self.warnings, scheme)

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
    "tripy": Target(
        tripy.RULES,
        tripy.WARNINGS,
        tripy.cache_refusal,
        "tripy",
        "TripyLayout",
        files=("tripy.json",),
    ),
    "tensorrt": Target(
        tensorrt.RULES, tensorrt.WARNINGS, tensorrt.cache_refusal, "tensorrt", "TensorRTLayout"
    ),
    "modelopt": Target(
        modelopt.RULES,
        modelopt.WARNINGS,
        modelopt.cache_refusal,
        "modelopt",
        "ModelOptLayout",
        files=("config.json",),
        quantized_files=("hf_quant_config.json",),
        rotation_refusal=modelopt.rotation_refusal,
    ),
    "compressed-tensors": Target(
        compressed_tensors.RULES,
        compressed_tensors.WARNINGS,
        compressed_tensors.cache_refusal,
        "compressed_tensors",
        "CompressedTensorsLayout",
        files=("config.json",),
        has_runner=True,
    ),
}
