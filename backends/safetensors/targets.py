"""What each safetensors target expresses, and where its layout is. Torch-free, for ``rotq
backends``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from backends.rules import Limits, Rule, first_rule
from backends.safetensors.compressed_tensors import limits as compressed_tensors
from backends.safetensors.file_names import CONFIG_FILE, QUANT_CONFIG_FILE, STATEMENT_FILE
from backends.safetensors.modelopt import limits as modelopt
from backends.safetensors.tensorrt import limits as tensorrt
from backends.safetensors.tripy import limits as tripy
from calib.schemes import LinearScheme, TensorScheme

if TYPE_CHECKING:
    from backends.base import ProbedModel, Reason, Request, RuntimeModel
    from backends.safetensors.layout import Layout
    from backends.safetensors.read import Bundle
    from calib.artifact import QuantizedModel

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
    runner: Literal["own", "stand-in"] | None = None
    """Whether the subpackage's ``runner.load`` runs a bundle in the target itself, or in another
    reader of the same files, where that reads all of them as the target does."""
    asks_of_models: bool = False
    """Whether the subpackage's ``models.reasons`` knows more that speaks against a model."""
    rotation_refusal: Callable[[str], str | None] = lambda kind: None
    """Why it cannot express rotations of a kind; by default it can express all."""
    prefix_refusal: str | None = None
    """Why its readers cannot put a prefix before every sequence, if they cannot."""
    rotation_warning: Callable[[str], str | None] = lambda kind: None
    """What comes with rotations of a kind that it can express; by default nothing."""
    online_block: int | None = None
    """See :class:`~backends.base.BlocksRotations`."""
    not_run_in: str = ""
    """Its readers that rotq does not run, in words."""

    @property
    def limits(self) -> Limits:
        """The same as answers, with the versions that they speak of where others are installed."""
        return Limits(
            linear=self._refusal,
            slow=self._warning,
            cache=lambda scheme: self._of_it(self.cache_refusal(scheme)),
            rotation=lambda kind: self._of_it(self.rotation_refusal(kind)),
            slow_rotation=lambda kind: self._of_it(self.rotation_warning(kind)),
            options={} if self.prefix_refusal is None else {"prefix": self.prefix_refusal},
        )

    def named_in(self, reason: str) -> list[Runtime]:
        """The readers that a reason names; where it names none, it speaks of what the rules do."""
        return [reader for reader in self.readers if reader.name in reason] or [self.of]

    def reasons(self, request: Request) -> list[Reason]:
        """What speaks against the model of ``request``, which has a config; imports torch."""
        assert request.config is not None
        refusal = self.layout().model_refusal(request.config, request.linears)
        reasons = [] if refusal is None else [refusal]
        if self.asks_of_models:
            reasons += self._load("models").reasons(request)
        return reasons

    def _refusal(self, scheme: LinearScheme) -> str | None:
        rule = first_rule(self.rules, scheme)
        return None if rule is None else self._words(rule, [self.of])

    def _warning(self, scheme: LinearScheme) -> str | None:
        rule = first_rule(self.warnings, scheme)
        return None if rule is None else self._words(rule, self.named_in(rule.reason))

    def _words(self, rule: Rule, runtimes: list[Runtime]) -> str:
        return rule.words() if rule.of else stated(rule.reason, runtimes)

    def _of_it(self, reason: str | None) -> str | None:
        return None if reason is None else stated(reason, self.named_in(reason))

    def layout(self) -> Layout:
        """The layout; imports torch."""
        layout: Layout = getattr(self._load("layout"), self.layout_class)()
        return layout

    def contradictions(self, bundle: Bundle, model: QuantizedModel) -> Mapping[str, Sequence[str]]:
        """What the subpackage's ``metadata`` finds that the bundle states otherwise than it is."""
        found: Mapping[str, Sequence[str]] = self._load("metadata").contradictions(bundle, model)
        return found

    def run(self, folder: Path, *, exact: bool) -> RuntimeModel:
        """The bundle in ``folder`` in the library that :attr:`runner` is about.

        Raises:
            RuntimeMissing: it is not installed, or stands in for the target and does not read the
                bundle as that does.
        """
        model: RuntimeModel = self._load("runner").load(
            folder, exact=exact, stands_in=self.runner == "stand-in", not_run_in=self.not_run_in
        )
        return model

    def run_probed(self, folder: Path) -> ProbedModel:
        """:meth:`run`, asked to be exact, with its linears in the open."""
        model: ProbedModel = self._load("runner").load(
            folder, exact=True, stands_in=self.runner == "stand-in", not_run_in=self.not_run_in
        )
        return model

    def _load(self, name: str) -> Any:
        return import_module(f"{_PACKAGE}.{self.module}.{name}")


_OWN_CACHE = (
    "its readers own their KV cache, and start it empty; their way with massive tokens are scales"
    " per token (activations.granularity 'token' in the recipe)"
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
        not_run_in="Tripy",
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
        not_run_in="TensorRT",
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
        not_run_in="TensorRT-LLM or vLLM",
        prefix_refusal=_OWN_CACHE,
    ),
    "vllm": Target(
        (*compressed_tensors.FORMAT, *compressed_tensors.VLLM_REFUSALS),
        compressed_tensors.VLLM_WARNINGS,
        compressed_tensors.vllm_cache_refusal,
        "compressed_tensors",
        "VllmLayout",
        COMPRESSED_TENSORS,
        readers=(VLLM,),
        how="format",
        files=(CONFIG_FILE,),
        runner="stand-in",
        asks_of_models=True,
        rotation_refusal=compressed_tensors.vllm_rotation_refusal,
        rotation_warning=compressed_tensors.vllm_rotation_warning,
        online_block=compressed_tensors.ONLINE_BLOCK,
        not_run_in="vLLM",
        prefix_refusal=_OWN_CACHE,
    ),
    "transformers": Target(
        compressed_tensors.FORMAT,
        compressed_tensors.TRANSFORMERS_WARNINGS,
        compressed_tensors.cache_refusal,
        "compressed_tensors",
        "TransformersLayout",
        COMPRESSED_TENSORS,
        readers=(TRANSFORMERS,),
        how="format",
        files=(CONFIG_FILE,),
        runner="own",
        asks_of_models=True,
        rotation_refusal=compressed_tensors.transformers_rotation_refusal,
        prefix_refusal=_OWN_CACHE,
    ),
    "compressed-tensors": Target(
        (*compressed_tensors.FORMAT, *compressed_tensors.VLLM_REFUSALS),
        (*compressed_tensors.VLLM_WARNINGS, *compressed_tensors.TRANSFORMERS_WARNINGS),
        compressed_tensors.vllm_cache_refusal,
        "compressed_tensors",
        "CompressedTensorsLayout",
        COMPRESSED_TENSORS,
        readers=(VLLM, TRANSFORMERS),
        how="format",
        files=(CONFIG_FILE,),
        runner="own",
        asks_of_models=True,
        rotation_refusal=compressed_tensors.transformers_rotation_refusal,
        not_run_in="vLLM",
        prefix_refusal=_OWN_CACHE,
    ),
}
"""One line of ``--target`` each. The last three are files of one format: what vLLM reads, what
transformers reads, and what both do."""
