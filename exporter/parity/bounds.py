"""Where bounds come from. Those of rung 2 are floors that are measured in torch on the same rows;
that of the divergence is what the gate measured, with room for other text and for the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from backends.base import DescribedModel, RuntimeModel
from calib.artifact import QuantizedModel
from calib.measure.floor import Distances, naive_logits, one_flip_floor, split_logits
from calib.measure.perplexity import LogitsFunction
from exporter.parity.rows import row
from exporter.parity.subject import Subject
from exporter.reporting.report import GateRow, ParityRow

LINEAR_BOUND = 1e-5
"""One linear in float32: only the order of a float sum differs; 2e-7 is usual, 1e-5 leaves room for
wide layers.
"""
UNROUNDED_BOUND = 1e-5
"""End to end in float32 where nothing is rounded on the way, so that nothing amplifies:
weight-only, and float.
"""
FLOOR_FACTOR = 2.0
"""Two right orders of summation are one floor apart; a runtime differs in every operator."""
_SPLIT, _NAIVE = "split-sum floor", "naive floor"
NAIVE_FACTOR = 2.0
"""A short dtype: a runtime may lose twice what the naive path in that dtype loses. It rounds at
other places.
"""


@dataclass(frozen=True)
class Floors:
    """What rung 2 runs in torch beside the export, on the same rows, to know what may be asked of
    it.
    """

    subject: Subject
    reference: nn.Module
    """Its fake-quant in float32."""

    def naive(self) -> dict[str, LogitsFunction]:
        """The same fake-quant in a short dtype, a model of its own, by the name of its row."""
        return {_NAIVE: naive_logits(self.subject.quantized)} if self.subject.short else {}

    def own(self, default: RuntimeModel) -> dict[str, LogitsFunction]:
        """The same in the dtype that the session ``default``, which a user gets, computes in of its
        own accord.
        """
        dtype = self._own_precision(default)
        if dtype is None:
            return {}
        return {_own_named(dtype): naive_logits(self.subject.quantized, dtype)}

    def split(self) -> dict[str, LogitsFunction]:
        """The reference itself with its sums split, by the name of its row, where that is asked
        for.
        """
        if self.subject.short or not _rounds_on_the_way(self.subject):
            return {}
        return {_SPLIT: split_logits(self.reference)}

    def _own_precision(self, runtime: RuntimeModel) -> torch.dtype | None:
        """What the default session computes in where that is shorter than the file says; ``None``
        too where it has a note, and so is not judged at all.
        """
        if runtime.note or not isinstance(runtime, DescribedModel):
            return None
        dtype: torch.dtype = getattr(torch, runtime.precision)
        same = torch.finfo(dtype).eps <= torch.finfo(self.subject.quantized.dtype).eps
        return None if same else dtype

    def exact_bound(self, found: Mapping[str, Distances]) -> tuple[float, list[ParityRow]]:
        """The bound of a session with arithmetic as written, and the rows that say where it comes
        from.

        Args:
            found: how far what :meth:`naive` and :meth:`split` name is from the reference.
        """
        subject = self.subject
        if subject.short:
            naive = found[_NAIVE].value
            note = f"the same fake-quant in torch in {subject.dtype_name}, against float32"
            return NAIVE_FACTOR * naive, [row(2, _NAIVE, "relative L2", naive, None, note)]
        if _SPLIT not in found:
            return UNROUNDED_BOUND, []

        split = found[_SPLIT]
        note = (
            f"torch against itself, sums in another order; flips in {split.flipped:.0%} of the rows"
        )
        rows = [row(2, _SPLIT, "relative L2", split.value, None, note)]
        floor = split.value
        if not split.representative:
            flip = one_flip_floor(self.reference, subject.proof_rows, last=subject.last)
            note = "flips are rare here: one value a row rounded over"
            rows.append(row(2, "one-flip floor", "relative L2", flip, None, note))
            floor = max(floor, flip)
        return max(FLOOR_FACTOR * floor, UNROUNDED_BOUND), rows

    def default_bound(
        self, default: RuntimeModel, found: Mapping[str, Distances], exact: float
    ) -> tuple[float, list[ParityRow]]:
        """The same for the default session; ``exact`` where it computes as the file says.

        Args:
            default: the session.
            found: how far what :meth:`own` names is from the reference.
            exact: the bound of the other session.
        """
        dtype = self._own_precision(default)
        if dtype is None:
            return exact, []
        name = str(dtype).removeprefix("torch.")
        naive = found[_own_named(dtype)].value
        note = (
            f"the default session computes in {name} of its own accord: the same fake-quant in"
            f" torch in {name}, against float32"
        )
        floor = row(2, _own_named(dtype), "relative L2", naive, None, note)
        return max(exact, NAIVE_FACTOR * naive), [floor]


def _own_named(dtype: torch.dtype) -> str:
    return f"{_NAIVE} in {str(dtype).removeprefix('torch.')}"


KL_FACTOR = 3.0
"""KL of an export over that of the gate's own row, or over the logarithm of the bound on
perplexity. Chosen, unlike the floors of rung 2: other text, and a runtime that rounds more than it
is told, made up to 1.5 of it on the models of the benchmarks, and scales of activations twice too
large make four times and more."""
KL_LEAST = 2e-3
"""In nats per token: what a default session may add by itself where the artifact adds nothing."""


def kl_bound(quantized: QuantizedModel) -> tuple[float | None, str]:
    """The bound on KL(original ‖ export), and where it comes from.

    A perplexity may stay as it is while the model becomes another one; the divergence does not. It
    is about the logarithm of the ratio of perplexities on text that the original writes, and was
    measured by the gate, where there was one, on text like this.
    """
    allowed = math.log(quantized.scheme.max_perplexity_ratio)
    tried = map(GateRow.model_validate, quantized.provenance.gate)
    measured = next((row.kl for row in tried if row.chosen), None)
    if _own_text(quantized):
        measured = None
    if measured is not None and (measured < allowed or quantized.prefix is not None):
        return KL_FACTOR * measured + KL_LEAST, f"the gate measured {measured:.3g}"
    if quantized.prefix is not None:
        return None, "the prefix makes another float model, and no gate measured what it changes"
    return KL_FACTOR * allowed + KL_LEAST, ""


def _own_text(quantized: QuantizedModel) -> bool:
    """Whether what is evaluated on is a text of its own, on which limits may clip more than on that
    of the gate.
    """
    evaluation = quantized.provenance.recipe.get("evaluation", {})
    return evaluation.get("dataset") is not None


def _rounds_on_the_way(subject: Subject) -> bool:
    """Whether activations or the cache are rounded to few values, which a difference in a last bit
    can flip.
    """
    quantized = subject.quantized
    return quantized.cache is not None or any(
        scheme.input is not None for scheme in quantized.schemes().values()
    )
