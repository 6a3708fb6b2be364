"""Rung 3: the original float model against the export, as a user runs it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from backends.base import RuntimeModel
from calib.measure.perplexity import LogitsFunction, model_logits
from exporter.parity.behaviour import behaviour_rows, followed_rows
from exporter.parity.bounds import kl_bound
from exporter.parity.passes import runtime_logits
from exporter.parity.rows import NO_ORIGINAL, not_run, ran, row, source_notes
from exporter.parity.sequential import Scores, score_until_settled
from exporter.parity.subject import Missing, Sessions, Subject
from exporter.parity.walks import WALKED, original_logits
from exporter.reporting.evidence import Evidence
from exporter.reporting.report import ParityRow

_NAME = "original float vs exported"
_STEPPED_ROWS, _STEPPED_TOKENS = 8, 128
"""What is scored where a folder gives last logits only, and so has to be run token by token."""
_LARGEST = 700.0
"""What a float holds the exponential of."""


def quality_rows(subject: Subject, sessions: Sessions) -> list[ParityRow]:
    """The figures of rung 3."""
    runtime = sessions.default
    if subject.source is None:
        return [not_run(3, _NAME, "perplexity ratio", NO_ORIGINAL)]
    if isinstance(runtime, Missing):
        return [not_run(3, _NAME, "perplexity ratio", runtime.reason)]
    rows = subject.rows
    if subject.last:
        rows = [ids[:_STEPPED_TOKENS] for ids in rows[:_STEPPED_ROWS]]

    compare = _compared_by_walk if subject.quantized.by_blocks else _compared
    scores, behaviour = compare(subject, rows, runtime)

    ratio_bound = subject.quantized.scheme.max_perplexity_ratio
    kl, kl_note = kl_bound(subject.quantized)
    reference, ratio = scores.reference.value, scores.candidate.value / scores.reference.value
    notes = [
        f"{reference:.4f} -> {scores.candidate.value:.4f} on {scores.tokens} tokens"
        f"{_interval(scores, len(rows))}"
    ]
    notes += source_notes(subject.source)
    if subject.quantized.by_blocks:
        notes.append(WALKED)
    judged = row(3, _NAME, "perplexity ratio", ratio, ratio_bound, "; ".join(notes), **ran(runtime))
    finite = math.isfinite(reference) and math.isfinite(scores.candidate.value)
    seen = Evidence(perplexities=(reference, scores.candidate.value)) if finite else None
    return [
        row(3, _NAME, "KL", scores.kl.value, kl, kl_note, **ran(runtime)),
        row(3, _NAME, "top-1 agreement", scores.top1, None, **ran(runtime)),
        judged.model_copy(update={"evidence": seen}),
        *behaviour,
    ]


def _compared(
    subject: Subject, rows: Sequence[Tensor], runtime: RuntimeModel
) -> tuple[Scores, list[ParityRow]]:
    """The predictions of the original, whole in memory, and of the export; and what they write."""
    assert subject.source is not None  # by the caller
    original = subject.source.original(subject.device)
    scores = _scores(subject, model_logits(original), runtime, rows)
    return scores, behaviour_rows(subject, original, scores.reference.value, runtime)


def _compared_by_walk(
    subject: Subject, rows: Sequence[Tensor], runtime: RuntimeModel
) -> tuple[Scores, list[ParityRow]]:
    """The same, the original a block at a time."""
    with original_logits(subject, rows) as logits:
        scores = _scores(subject, logits, runtime, rows)
    return scores, followed_rows(subject, runtime)


def _scores(
    subject: Subject, logits: LogitsFunction, runtime: RuntimeModel, rows: Sequence[Tensor]
) -> Scores:
    bound = subject.quantized.scheme.max_perplexity_ratio
    kl, _ = kl_bound(subject.quantized)
    return score_until_settled(logits, runtime_logits(runtime), rows, bound, kl)


def _interval(scores: Scores, rows: int) -> str:
    """How many rows were scored, and the interval of the ratio of perplexities; nothing of a single
    row, which has none.
    """
    mean = scores.log_ratio
    if not math.isfinite(mean.half):
        return ""
    low, high = (math.exp(min(mean.value + sign * mean.half, _LARGEST)) for sign in (-1, 1))
    return f" of {len(scores.rows)} of {rows} rows: ratio {low:.4f} to {high:.4f}"
