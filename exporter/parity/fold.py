"""Rung 1: the original float model against the rotated one."""

from __future__ import annotations

import torch
from torch import nn

from calib.fusing import materialize
from calib.measure.floor import Difference
from calib.measure.perplexity import model_logits
from exporter.parity.rows import NO_ORIGINAL, not_run, row
from exporter.parity.subject import Subject
from exporter.reporting.report import ParityRow
from exporter.source import Source

FOLD_BOUND = 1e-5
"""In float32: rotating in float64 and rounding once costs a few ulp (6e-8) per layer."""
ROUNDING_FACTOR = 2.0
"""In a shorter dtype: how much farther from the float32 original the rotated model may be than the
original in that dtype. Its weights are rounded once more, an error of the size of those that
rounding activations makes anyway."""

_NAME = "original float vs rotated float"


def fold_row(subject: Subject) -> ParityRow:
    """The figure of rung 1."""
    if subject.source is None or subject.fused is None:
        return not_run(1, _NAME, "relative L2", NO_ORIGINAL)
    if not subject.short:
        return row(
            1,
            _NAME,
            "relative L2",
            _lost(subject, subject.source, materialize(subject.fused)),
            FOLD_BOUND,
        )
    naive = _lost(
        subject,
        subject.source,
        parameters_in(subject.source.original("cpu"), subject.quantized.dtype),
    )
    measured = _lost(subject, subject.source, materialize(subject.fused))
    note = f"both in {subject.dtype_name}; the original itself loses {naive:.3g} in it"
    return row(1, _NAME, "relative L2", measured, ROUNDING_FACTOR * naive, note)


def parameters_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` in ``dtype`` as from_pretrained gives it: buffers such as rotary frequencies stay
    in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _lost(subject: Subject, source: Source, model: nn.Module) -> float:
    """Relative L2 of ``model``'s logits against those of the original in float32."""
    original, logits = (
        model_logits(source.original(subject.device)),
        model_logits(model.to(subject.device)),
    )
    difference = Difference()
    for ids in subject.rows:
        difference.add(logits(ids.unsqueeze(0)), original(ids.unsqueeze(0)))
    return difference.value
