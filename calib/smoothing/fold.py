"""Folding a smoothing scale into the tensors of a model, exactly.

    writer, a norm:    gain g <- g / s,  bias b <- b / s
    writer, a linear:  its rows and their bias, divided by s
    readers:           columns, multiplied by s
    behind R4:         W R4 becomes W diag(s) R4, and (W R4) R4^T is W

Arithmetic is float64 and rounded once, to the dtype of the tensors. A norm's gain is rounded first,
and the readers take ``s = g / g'`` of the gain ``g'`` as it is stored: rounding the gain then
changes nothing. That matters most where the norm stores ``g - 1`` (Gemma), whose small gains
bfloat16 cannot tell apart.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from calib.architectures import LinearSpec, NormSpec, Wiring
from calib.errors import QuantizationError
from calib.smoothing.groups import SmoothingGroup


def fold_scales(
    state: MutableMapping[str, Tensor], group: SmoothingGroup, s: Tensor, wiring: Wiring
) -> Tensor:
    """Divide the writer of ``group`` by ``s`` and multiply its readers by it.

    Args:
        state: tensors of a fused model, or those of one block of it; changed tensors are replaced
            by new ones in the same dtype, never written into.
        group: one of :func:`~calib.smoothing.groups.smoothing_groups` of a model whose norms are
            folded.
        s: ``[group.width]``, positive. A scale of 1 leaves every bit of its channel.
        wiring: that of the model.

    Returns:
        The scale that was folded, float64 ``[width]``: ``s`` but for the rounding of a norm's gain.
        A channel whose gain would round to zero keeps a scale of 1.

    Raises:
        QuantizationError: ``s`` has another length or is not positive and finite, or a weight
            overflows its dtype.
    """
    if s.shape != (group.width,):
        raise QuantizationError(
            f"the scale for {group.name} has shape {list(s.shape)}, it needs [{group.width}]"
        )
    if not bool((torch.isfinite(s) & (s > 0)).all()):
        raise QuantizationError(
            f"the smoothing scale for {group.name} is not positive and finite everywhere"
        )
    s = s.double()
    if isinstance(group.writer, NormSpec):
        s = _divide_norm(state, group.writer, s, wiring.architecture.gain_offset)
    else:
        _divide_rows(state, group.writer, group.rows, s)
    for spec in group.readers:
        _store(state, spec.weight, _multiplied(state[spec.weight].double(), group, s))
    return s


def _multiplied(weight: Tensor, group: SmoothingGroup, s: Tensor) -> Tensor:
    """``weight`` of a reader, ``[out, in]``, with its columns multiplied in front of R4."""
    columns = group.expanded(s).to(weight.device)
    if group.rotation is None:
        return weight * columns
    return group.rotation.apply(group.rotation.undo(weight) * columns)


def _divide_norm(
    state: MutableMapping[str, Tensor], norm: NormSpec, s: Tensor, offset: float
) -> Tensor:
    stored = state[norm.weight]
    gain = stored.double() + offset
    divided = (gain / s.to(gain.device) - offset).to(stored.dtype)
    rounded = divided.double() + offset
    lost = rounded == 0
    _store(state, norm.weight, torch.where(lost, stored, divided))
    s = torch.where(lost, torch.ones_like(gain), gain / rounded)
    if norm.bias in state:
        _store(state, norm.bias, state[norm.bias].double() / s)
    return s


def _divide_rows(
    state: MutableMapping[str, Tensor], spec: LinearSpec, rows: Sequence[slice], s: Tensor
) -> None:
    parts = torch.split(s, [part.stop - part.start for part in rows])
    for name in (spec.weight, spec.bias):
        if name is None or name not in state:
            continue
        divided = state[name].to(torch.float64, copy=True)
        for part, factors in zip(rows, parts, strict=True):
            divided[part] /= factors.to(divided.device).reshape(-1, *[1] * (divided.dim() - 1))
        _store(state, name, divided)


def _store(state: MutableMapping[str, Tensor], name: str, values: Tensor) -> None:
    rounded = values.to(state[name].dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise QuantizationError(
            f"tensor {name} does not fit {rounded.dtype} once its smoothing scale is folded",
            hint="calibrate in bfloat16 or float32: --dtype bfloat16, or leave smoothing out",
        )
    state[name] = rounded
