"""The gate: quantize each candidate, a set of rotations with a prefix or without, and keep the one
that is closest to the float model.

Rotating can hurt: R1 and R2 alone may worsen static INT8, and on some models nothing helps. A
prefix makes another float model, which may be worth what it saves and may not. So nothing is
assumed. Every candidate goes through the same calibration, and the mean KL(float ‖ quantized) of
the whole model on held-out tokens, which neither trained a rotation nor set a scale, decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from calib.artifact import QuantizedModel
from calib.fusing import FusedModel
from calib.measure.perplexity import LogitsFunction, compare_logits, model_logits
from calib.measure.reference import build_reference
from calib.progress import Progress, track
from exporter.reporting.report import GateRow


@dataclass(frozen=True)
class Setup:
    """What a candidate is made of; ``str()`` is what the report calls it."""

    rotate: str
    """Its rotations, as the report calls them."""
    prefix: tuple[int, ...] = ()
    """Ids of the tokens before every sequence."""

    def __str__(self) -> str:
        return f"{self.rotate} + prefix" if self.prefix else self.rotate


@dataclass(frozen=True)
class Candidate:
    """A setup, fused and quantized."""

    setup: Setup
    fused: FusedModel
    quantized: QuantizedModel


def choose(
    setups: Sequence[Setup],
    make: Callable[[Setup], Candidate],
    original: LogitsFunction,
    rows: Sequence[Tensor],
    progress: Progress,
) -> tuple[Candidate, list[GateRow]]:
    """The candidate with the lowest KL, and a row for each. Of equals the first wins, so list the
    simplest first.

    Args:
        setups: what is compared.
        make: fuses and quantizes one of them. Only the best so far is kept in memory.
        original: logits of the float model.
        rows: held-out token rows.
        progress: called after each candidate.
    """
    best: Candidate | None = None
    table: list[GateRow] = []
    window = max(row.numel() for row in rows)

    for setup in track(setups, "gate", len(setups), progress):
        candidate = make(setup)
        reference = model_logits(build_reference(candidate.quantized))
        result = compare_logits(original, reference, rows, window=window, stride=window)
        row = GateRow(
            rotate=setup.rotate,
            prefix=len(setup.prefix),
            kl=result.kl,
            top1=result.top1,
            perplexity=result.candidate.value,
        )
        if best is None or row.kl < min(other.kl for other in table):
            best = candidate
        table.append(row)

    assert best is not None  # there is at least one candidate
    chosen = setups.index(best.setup)
    return best, [
        row.model_copy(update={"chosen": index == chosen}) for index, row in enumerate(table)
    ]
