"""What each safetensors target expresses, and where its layout is. Torch-free, for ``rotq
backends``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.facts import (
    COMPRESSED_TENSORS,
    MODELOPT,
    TENSORRT_LLM,
    TENSORRT_RTX,
    TRANSFORMERS,
    TRIPY,
    VLLM,
    How,
    Runtime,
    stated,
)
from backends.rules import Limits, Rule, first_reason
from backends.safetensors.compressed_tensors import limits as compressed_tensors
from backends.safetensors.file_names import CONFIG_FILE, QUANT_CONFIG_FILE, STATEMENT_FILE
from backends.safetensors.modelopt import limits as modelopt
from backends.safetensors.tensorrt import limits as tensorrt
from backends.safetensors.tripy import limits as tripy
from calib.schemes import LinearScheme, TensorScheme

if TYPE_CHECKING:
    from backends.base import RuntimeModel
    from backends.safetensors.layout import Layout

_PACKAGE = "backends.safetensors"


@dataclass(frozen=True)
class Target:
    """A key layout, and the runtime it is for."""

    rules: tuple[Rule, ...]
    """What it cannot express."""
    warnings: tuple[Rule, ...]
    """What its readers take at a price."""
    cache_refusal: Callable[[TensorScheme], str | None]
    """Why it cannot express a KV cache."""
    module: str
    """Subpackage of the layout."""
    layout_class: str
    of: Runtime
    """What the rules speak of: the library whose format it is, or the runtime."""
    readers: tuple[Runtime, ...]
    """What the warnings speak of, where they name it."""
    how: How
    """How the rules are known."""
    files: tuple[str, ...] = ()
    """What is written besides weights, index, manifest and what every export has."""
    quantized_files: tuple[str, ...] = ()
    """The same, only where something is quantized."""
    has_runner: bool = False
    """Whether the subpackage's ``runner.load`` runs a bundle in a library of the target's own."""
    rotation_refusal: Callable[[str], str | None] = lambda kind: None
    """Why it cannot express rotations of a kind; by default it can express all."""
    prefix_refusal: str | None = None
    """Why its readers cannot put a prefix before every sequence, if they cannot."""

    @property
    def limits(self) -> Limits:
        """The same as answers, with the versions that they speak of where others are installed."""
        return Limits(
            linear=self._refusal,
            slow=self._warning,
            cache=self._cache_refusal,
            rotation=self.rotation_refusal,
            options={} if self.prefix_refusal is None else {"prefix": self.prefix_refusal},
        )

    def named_in(self, warning: str) -> list[Runtime]:
        """The readers that a warning names; where it names none, it speaks of what the rules do."""
        return [reader for reader in self.readers if reader.name in warning] or [self.of]

    def _refusal(self, scheme: LinearScheme) -> str | None:
        reason = first_reason(self.rules, scheme)
        return None if reason is None else stated(reason, [self.of])

    def _warning(self, scheme: LinearScheme) -> str | None:
        reason = first_reason(self.warnings, scheme)
        return None if reason is None else stated(reason, self.named_in(reason))

    def _cache_refusal(self, scheme: TensorScheme) -> str | None:
        reason = self.cache_refusal(scheme)
        return None if reason is None else stated(reason, [self.of])

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


_OWN_CACHE = (
    "its readers own their KV cache, and start it empty; their way with massive tokens are scales"
    " per token (activations.granularity 'token' in the recipe)"
)

_NO_CACHE = (
    "what rotq builds for it runs whole sequences without a cache that could be begun with one"
)

TARGETS: Mapping[str, Target] = {
    "tripy": Target(
        tripy.RULES,
        tripy.WARNINGS,
        tripy.cache_refusal,
        "tripy",
        "TripyLayout",
        TRIPY,
        readers=(),
        how="tested",
        files=(STATEMENT_FILE,),
        prefix_refusal=_NO_CACHE,
    ),
    "tensorrt": Target(
        tensorrt.RULES,
        tensorrt.WARNINGS,
        tensorrt.cache_refusal,
        "tensorrt",
        "TensorRTLayout",
        TENSORRT_RTX,
        readers=(),
        how="tried",
        prefix_refusal=_NO_CACHE,
    ),
    "modelopt": Target(
        modelopt.RULES,
        modelopt.WARNINGS,
        modelopt.cache_refusal,
        "modelopt",
        "ModelOptLayout",
        MODELOPT,
        readers=(VLLM, TENSORRT_LLM),
        how="format",
        files=(CONFIG_FILE,),
        quantized_files=(QUANT_CONFIG_FILE,),
        rotation_refusal=modelopt.rotation_refusal,
        prefix_refusal=_OWN_CACHE,
    ),
    "compressed-tensors": Target(
        compressed_tensors.RULES,
        compressed_tensors.WARNINGS,
        compressed_tensors.cache_refusal,
        "compressed_tensors",
        "CompressedTensorsLayout",
        COMPRESSED_TENSORS,
        readers=(VLLM, TRANSFORMERS),
        how="format",
        files=(CONFIG_FILE,),
        has_runner=True,
        prefix_refusal=_OWN_CACHE,
    ),
}
