"""Some outputs of a quantized linear as a linear, and linears beside each other as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calib.artifact import PARTS, QuantizedLinear
from calib.schemes import PerTensor


def rows_of(linear: QuantizedLinear, rows: slice) -> QuantizedLinear:
    """The outputs ``rows`` of ``linear``, under its own name."""
    return _changed(linear, {name: part[rows] for name, part in _parts(linear).items()})


def joined(linears: Sequence[QuantizedLinear], *, weight: Tensor | None = None) -> QuantizedLinear:
    """The inverse of :func:`rows_of`: ``linears`` beside each other, under the name of the first.

    Args:
        linears: alike in all but their rows.
        weight: in place of theirs, so that these need not be read.
    """
    if len(linears) == 1:
        return linears[0]

    whole = {
        name: torch.cat([getattr(linear, name) for linear in linears])
        for name in _parts(linears[0])
        if name != "weight" or weight is None
    }
    return _changed(linears[0], whole if weight is None else whole | {"weight": weight})


def _parts(linear: QuantizedLinear) -> dict[str, Tensor]:
    one_scale = isinstance(linear.weight_scheme.granularity, PerTensor)
    by_row = [
        name
        for name, part in PARTS.items()
        if part.by_row and not (one_scale and part.kind in ("scale", "zero point"))
    ]
    return {name: part for name in by_row if (part := getattr(linear, name)) is not None}


def _changed(linear: QuantizedLinear, parts: dict[str, Tensor]) -> QuantizedLinear:
    changes: dict[str, Any] = {name: part.contiguous() for name, part in parts.items()}
    return replace(linear, **changes)
