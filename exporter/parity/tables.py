"""Rung 1, of embeddings: every row of a table against the original's, also those of tokens that no
text at hand holds.

Folding takes a row to ``e R1``, an orthogonal image of itself: its length stays. So the lengths of
all rows are compared, in float64, which needs neither the rotation nor the code that folds it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib.fusing import FusedModel
from calib.fusing.contents import source_tensors
from calib.network.skeleton import expected_tensors
from calib.rotations.rotation_set import ORTHOGONALITY_TOLERANCE
from exporter.parity.rows import row
from exporter.reporting.report import ParityRow
from exporter.source import Source

_NAME, _METRIC = "embedding rows, original float vs rotated float", "relative length"
_ROWS = 8192
"""At once."""


def table_rows(source: Source, fused: FusedModel) -> list[ParityRow]:
    """The row of an embedding whose length changed most, against what rounding may change."""
    worst, where = 0.0, ""
    expected = expected_tensors(source.wiring.config)
    tensors = source_tensors(source.checkpoint, source.wiring, expected)
    for table in source.wiring.embeddings:
        original, rotated = tensors.read(table.weight), fused.state[table.weight]
        for start in range(0, len(original), _ROWS):
            rows = slice(start, start + _ROWS)
            apart = _apart(original[rows], rotated[rows])
            if float(apart.amax()) > worst:
                worst = float(apart.amax())
                where = f"worst: row {start + int(apart.argmax())} of {table.name}"
    return [row(1, _NAME, _METRIC, worst, _bound(fused), where)]


def _apart(original: Tensor, rotated: Tensor) -> Tensor:
    """How far the lengths of rows are apart, relative to the longer one."""
    one, other = (
        tensor.detach().to("cpu", torch.float64).norm(dim=-1) for tensor in (original, rotated)
    )
    # below the normal numbers of a dtype its steps are those of the smallest
    least = torch.finfo(rotated.dtype).tiny * math.sqrt(rotated.shape[-1])
    apart: Tensor = (one - other).abs() / torch.maximum(one, other).clamp(min=least)
    return apart


def _bound(fused: FusedModel) -> float:
    """Rounding moves each entry by half an eps of it, which is allowed twice; a matrix of somebody
    else is orthogonal to its tolerance ``t``, and ``|x Q|^2 = |x|^2 (1 + n t)`` at most.
    """
    hidden = fused.wiring.sizes.hidden
    return torch.finfo(fused.dtype).eps + hidden * ORTHOGONALITY_TOLERANCE / 2
