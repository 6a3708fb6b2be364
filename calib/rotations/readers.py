"""The rows of the weights that read a rotated space, in the layout of sampled activations.

A reader of ``x R`` holds ``W R``: its rows are rotated like tokens, and quantized like tokens with
scales of their own. Where the weights alone are quantized, they are what a rotation is judged by. A
row weighs as much as its matrix is small, so that every matrix counts by its relative error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from calib.architectures import Space, Wiring
from calib.capture.result import Samples

# Rows taken of each weight, evenly spaced: enough for a mean over rows, and few whatever the
# model's size is.
_ROWS = 1024


def residual_rows(state: Mapping[str, Tensor], wiring: Wiring) -> Samples | None:
    """Rows ``[rows, hidden]`` of every quantizable linear that reads the residual stream; ``None``
    if there is none.

    Args:
        state: tensors of the norm-folded model.
        wiring: that of the model.
    """
    parts = [_rows(weight) for weight in _weights(state, wiring, Space.RESIDUAL)]
    if not parts:
        return None
    powers = [part.square().mean().clamp_min(torch.finfo(torch.float32).tiny) for part in parts]
    weights = [(1 / power).expand(len(part)) for part, power in zip(parts, powers, strict=True)]
    return Samples(torch.cat(parts), torch.cat(weights), massive=0)


def value_rows(state: Mapping[str, Tensor], wiring: Wiring) -> Samples | None:
    """Rows of the attention output projections, ``[layers, kv_heads, rows * group, head_dim]``;
    ``None`` if none.

    The ``group`` parts of a row that read the query heads of one KV head follow each other, as the
    entries of one token do in captured samples.

    Args:
        state: tensors of the norm-folded model.
        wiring: that of the model.
    """
    sizes = wiring.sizes
    layers = []
    for weight in _weights(state, wiring, Space.VALUE):
        heads = _rows(weight).reshape(-1, sizes.kv_heads, sizes.group, sizes.head_dim)
        layers.append(heads.transpose(0, 1).flatten(1, 2))
    if not layers:
        return None
    values = torch.stack(layers)
    return Samples(
        values, torch.ones(values.shape[0], values.shape[2]), massive=0, group=sizes.group
    )


def _weights(state: Mapping[str, Tensor], wiring: Wiring, space: Space) -> list[Tensor]:
    """The weights ``[out, in]`` of the linears that read ``space`` and are quantized, in
    topological order.
    """
    return [
        state[spec.weight]
        for spec in wiring.linears
        if spec.reads is space and spec.quantizable and spec.layout != "experts"
    ]


def _rows(weight: Tensor) -> Tensor:
    return weight[:: -(-weight.shape[0] // _ROWS)].float()
