"""What there is to know of a target: one runtime that a graph is written for. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from backends.base import Int8Weights
from backends.facts import Runtime, stated
from backends.onnx.asking import Answer, Asked, Form
from backends.rules import Rule, first_reason
from calib.schemes import INT8, LinearScheme, NumberFormat, PerBlock, PerTensor, TensorScheme


@dataclass(frozen=True)
class Target:
    """A runtime profile of the ONNX backend."""

    compute_dtype: str
    opset: int
    rules: tuple[Rule, ...]
    """What it cannot express; the first that applies is the reason."""
    products: Collection[NumberFormat]
    """Formats that it multiplies as they are, inputs by weights. See :meth:`multiplies`."""
    runtime: Runtime
    """What it is, or what it was tried in."""
    warnings: tuple[Rule, ...] = ()
    """What it expresses and does not execute well, naming what it executes, where nobody can be
    asked.
    """
    asked: Asked | None = None
    """The installed runtime, which knows better than :attr:`warnings`."""
    told: Callable[[LinearScheme, Answer], str] | None = None
    """What an answer that is not a kernel of its own means, in words that follow the runtime's name
    and version.
    """
    caches: Mapping[NumberFormat, str] = field(default_factory=dict)
    """Why it cannot hold keys and values of these formats."""
    dtypes: Mapping[object, str] = field(default_factory=dict)
    """Why it cannot compute in these where ``--dtype`` asks for them."""
    shared_buffer: str | None = None
    """Why it cannot keep keys and values in one buffer that the graph writes into; ``None`` if it
    can.
    """
    whole_blocks: bool = True
    """Whether all blocks of a weight must be whole; else the last one may be short."""
    integer_rows: bool = True
    """Whether it looks up rows of an integer table; else the table is dequantized in front of the
    lookup.
    """
    packs: bool = False
    """Whether linears that read one value become one where that is faster
    (:mod:`backends.onnx.packing`). A compiler does so by itself."""
    rotary: bool = False
    """Whether RoPE becomes one operator (:mod:`backends.onnx.rotary`). A compiler fuses what is
    spelled out.
    """
    unsigned_inputs: bool = False
    """Whether int8 inputs with calibrated scales are stored in uint8, 128 above: what its kernels
    multiply, and what it fuses where linears share an input (:mod:`backends.onnx.inputs`)."""
    clips: Callable[[], bool] | None = None
    """Whether its products of unsigned inputs and signed weights are clipped on this CPU, so that
    weights are better stored unsigned too (:mod:`backends.onnx.weights`); ``None``: it takes signed
    weights alone, or chooses by itself."""
    counts_by_mask: bool = False
    """Whether the mask says how long the cache is, even where it holds fewer rows
    (:mod:`backends.onnx.cache_length`)."""
    branches: bool = False
    """Whether an If in every layer costs it next to nothing, and breaks no fused attention."""
    routed_experts: bool = True
    """Whether it runs an expert on the tokens that chose it; else on all."""

    def refusal(self, scheme: LinearScheme) -> str | None:
        """Why this target cannot express a linear of ``scheme``; ``None`` if it can."""
        reason = first_reason(self.rules, scheme)
        answer = self.asked.about(scheme) if reason is None and self.asked is not None else None
        if answer is None or not answer.refused:
            return reason
        return f"{self._here} does not load a graph of such a linear: {answer.refused}"

    def warning(self, scheme: LinearScheme) -> str | None:
        """What a linear of ``scheme`` falls back to; ``None`` if it runs in a kernel of its own."""
        answer = None if self.asked is None else self.asked.about(scheme)
        if answer is None or self.told is None:
            return first_reason(self.warnings, scheme)
        return None if answer.fused else f"{self._here} {self.told(scheme, answer)}"

    def cache_refusal(self, scheme: TensorScheme) -> str | None:
        """Why this target cannot express a KV cache of ``scheme``; ``None`` if it can."""
        reason = self.caches.get(scheme.format)
        return None if reason is None else stated(reason, [self.runtime])

    def shared_buffer_refusal(self) -> str | None:
        """Why it cannot keep keys and values in one buffer that the graph writes into; ``None`` if
        it can.
        """
        return None if self.shared_buffer is None else stated(self.shared_buffer, [self.runtime])

    def form(self, scheme: LinearScheme, int8_weights: Int8Weights = "auto") -> Form:
        """How a linear of ``scheme`` is written.

        Args:
            scheme: of its weight and its input.
            int8_weights: :attr:`backends.base.WriteOptions.int8_weights`.
        """
        multiplied = self.multiplies(scheme)
        return Form(
            unsigned_inputs=self.unsigned_inputs,
            unsigned_weights=multiplied
            and scheme.weight.format == INT8
            and self._unsigned(int8_weights),
            barrier=scheme.input is not None and not scheme.input.dynamic and not multiplied,
        )

    def _unsigned(self, int8_weights: Int8Weights) -> bool:
        """Whether int8 weights that it multiplies are stored in uint8."""
        if self.clips is None or int8_weights == "signed":
            return False
        return int8_weights == "unsigned" or self.clips()

    def int8_weights_refusal(self) -> str | None:
        """Why nobody chooses how its int8 weights are stored; ``None`` if one can."""
        return None if self.clips is not None else f"{self.runtime.name} takes int8 weights as int8"

    @property
    def _here(self) -> str:
        """The runtime that was asked."""
        return f"{self.runtime.name} {self.runtime.installed()}"

    def multiplies(self, scheme: LinearScheme) -> bool:
        """Whether a rounded input and a quantized weight of ``scheme`` become one product in their
        own format.
        """
        return same_format(scheme, self.products)


def same_format(scheme: LinearScheme, products: Collection[NumberFormat]) -> bool:
    """A scale can be taken out of a product only where it is the same for all features that are
    summed.
    """
    return (
        scheme.input is not None
        and isinstance(scheme.input.granularity, PerTensor)
        and not isinstance(scheme.weight.granularity, PerBlock)
        and scheme.input.format == scheme.weight.format
        and scheme.weight.format in products
    )
