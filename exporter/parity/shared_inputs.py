"""Rung 0, of static scales: linears that read one tensor have one scale.

Query, key and value read the very same tensor, and so do gate and up. An observer sees nothing but
that tensor, so where their scheme is one, so are their limits, to the last bit, whatever the
observer and however few its tokens. Held-out text cannot tell a range that is too wide for one
linear from that of a massive token in the text of calibration; beside a linear that read the same,
it needs no text.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from calib.architectures import reading_groups, wiring_of
from calib.artifact import QuantizedLinear, QuantizedModel
from exporter.parity.rows import row
from exporter.parity.subject import Subject
from exporter.reporting.report import ParityRow

_NAME, _METRIC = "static ranges of linears that read one input", "altered"


def shared_input_rows(subject: Subject) -> list[ParityRow]:
    """How many linears have another static scale than the first that reads the same; nothing where
    no two of them have to agree.
    """
    pairs = list(_pairs(subject.quantized))
    if not pairs:
        return []
    apart = [f"{other.name} and {one.name}" for one, other in pairs if not _agree(one, other)]
    note = f"{len(pairs)} compared" + (f"; apart: {', '.join(apart[:3])}" if apart else "")
    return [row(0, _NAME, _METRIC, float(len(apart)), 0.0, note)]


def _pairs(model: QuantizedModel) -> Iterator[tuple[QuantizedLinear, QuantizedLinear]]:
    """Each linear beside the first one of the same input scheme that reads the same tensor; experts
    of a 3-D parameter read tokens of their own.
    """
    wiring = wiring_of(model.config)
    for group in reading_groups(wiring):
        firsts: dict[object, QuantizedLinear] = {}
        for name in group:
            linear = model.linears.get(name)
            experts = wiring.quantizable[name].layout == "experts"
            if linear is None or linear.input_scale is None or experts:
                continue
            first = firsts.setdefault(linear.input_scheme, linear)
            if first is not linear:
                yield first, linear


def _agree(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    assert one.input_scale is not None
    assert other.input_scale is not None
    points = (one.input_zero_point, other.input_zero_point)
    same_points = points == (None, None) or (
        points[0] is not None and points[1] is not None and torch.equal(points[0], points[1])
    )
    return same_points and torch.equal(one.input_scale, other.input_scale)
