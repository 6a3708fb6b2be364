"""Rung 3: the original float model against the export, as a user runs it."""

from __future__ import annotations

from calib.measure.perplexity import compare_logits, model_logits
from exporter.parity.behaviour import behaviour_rows
from exporter.parity.bounds import kl_bound
from exporter.parity.passes import runtime_logits
from exporter.parity.rows import NO_ORIGINAL, not_run, ran, row
from exporter.parity.subject import Missing, Sessions, Subject
from exporter.reporting.report import ParityRow

_NAME = "original float vs exported"
_STEPPED_ROWS, _STEPPED_TOKENS = 8, 128
"""What is scored where a folder gives last logits only, and so has to be run token by token."""


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

    window = max(ids.numel() for ids in rows)
    original = subject.source.original(subject.device)
    scores = compare_logits(
        model_logits(original), runtime_logits(runtime), rows, window=window, stride=window
    )

    ratio, bound = (
        scores.candidate.value / scores.reference.value,
        subject.quantized.scheme.max_perplexity_ratio,
    )
    note = (
        f"{scores.reference.value:.4f} -> {scores.candidate.value:.4f} on {scores.reference.tokens}"
        " tokens"
    )
    return [
        row(3, _NAME, "KL", scores.kl, *kl_bound(subject.quantized), **ran(runtime)),
        row(3, _NAME, "top-1 agreement", scores.top1, None, **ran(runtime)),
        row(3, _NAME, "perplexity ratio", ratio, bound, note, **ran(runtime)),
        *behaviour_rows(subject, original, scores.reference.value, runtime),
    ]
