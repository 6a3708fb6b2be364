"""Where the bounds of rung 2 come from: floors that are measured in torch on the same rows, never
invented.
"""

from __future__ import annotations

import torch
from torch import nn

from backends.base import DescribedModel, RuntimeModel
from calib.measure.floor import naive_floor, one_flip_floor, split_sum_floor
from exporter.parity.rows import row
from exporter.parity.subject import Missing, Subject
from exporter.reporting.report import ParityRow

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
NAIVE_FACTOR = 2.0
"""A short dtype: a runtime may lose twice what the naive path in that dtype loses. It rounds at
other places.
"""


def end_to_end_bound(subject: Subject, reference: nn.Module) -> tuple[float, list[ParityRow]]:
    """The bound of the end-to-end rows, and the rows that say where it comes from."""
    if subject.short:
        naive = naive_floor(subject.quantized, reference, subject.rows, last=subject.last)
        note = f"the same fake-quant in torch in {subject.dtype_name}, against float32"
        return NAIVE_FACTOR * naive, [row(2, "naive floor", "relative L2", naive, None, note)]
    if not _rounds_on_the_way(subject):
        return UNROUNDED_BOUND, []

    split = split_sum_floor(subject.quantized, reference, subject.rows, last=subject.last)
    note = f"torch against itself, sums in another order; flips in {split.flipped:.0%} of the rows"
    rows = [row(2, "split-sum floor", "relative L2", split.value, None, note)]
    floor = split.value
    if not split.representative:
        flip = one_flip_floor(reference, subject.rows, last=subject.last)
        rows.append(
            row(
                2,
                "one-flip floor",
                "relative L2",
                flip,
                None,
                "flips are rare here: one value a row rounded over",
            )
        )
        floor = max(floor, flip)

    return max(FLOOR_FACTOR * floor, UNROUNDED_BOUND), rows


def own_precision_bound(
    subject: Subject, reference: nn.Module, runtime: RuntimeModel | Missing, bound: float
) -> tuple[float, list[ParityRow]]:
    """The bound of a session that computes in a shorter dtype than the file of its own accord; else
    ``bound``.

    Args:
        subject: what is compared.
        reference: its fake-quant in float32.
        runtime: the session as a user gets it, which says what it computes in. One with a note is
            not judged at all.
        bound: of a session with arithmetic as written.

    Returns:
        The bound, and the rows that say where it comes from.
    """
    if isinstance(runtime, Missing) or runtime.note or not isinstance(runtime, DescribedModel):
        return bound, []
    dtype: torch.dtype = getattr(torch, runtime.precision)
    if torch.finfo(dtype).eps <= torch.finfo(subject.quantized.dtype).eps:
        return bound, []
    naive = naive_floor(subject.quantized, reference, subject.rows, last=subject.last, dtype=dtype)
    note = (
        f"the default session computes in {runtime.precision} of its own accord: the same"
        f" fake-quant in torch in {runtime.precision}, against float32"
    )
    floor = row(2, f"naive floor in {runtime.precision}", "relative L2", naive, None, note)
    return max(bound, NAIVE_FACTOR * naive), [floor]


def _rounds_on_the_way(subject: Subject) -> bool:
    """Whether activations or the cache are rounded to few values, which a difference in a last bit
    can flip.
    """
    quantized = subject.quantized
    return quantized.cache is not None or any(
        scheme.input is not None for scheme in quantized.schemes().values()
    )
