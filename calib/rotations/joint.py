"""One rotation for what a linear layer reads *and* for its weight: rows of the weight are tokens
too.

With activation and weight both quantized, ``y = x W^T`` becomes ``(x + dx) (W + dW)^T``, so to
first order

    |dy|^2 = |dx W^T|^2 + |x dW^T|^2.

A rotation turns ``x`` into ``x R`` and ``W`` into ``W R``, leaves the exact product alone, and
makes both errors nearly white, of relative size ``e_x = |dx|^2 / |x|^2`` and ``e_W = |dW|^2 /
|W|^2``. Each term is then the same ``|x|^2 |W|^2 / n`` times its relative error, and ``e_x + e_W``
is what to minimise. A row of ``W R`` quantized with its own scale is exactly a token quantized with
its own scale. Trained on activations alone a rotation pays with the weights part of what it gains.

For R2 a token, and a row of the output projection, is all heads side by side
(:mod:`calib.rotations.readers`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from calib.capture.result import Samples
from calib.errors import RotationError
from calib.rotations.objectives import whole_inputs


def unit_rows(rows: Samples) -> Samples:
    """Rows at unit mean square, each with a weight in proportion to its own power: trained on like
    any token.

    No objective is ruled by a few large rows then, and every matrix still counts by its relative
    error ``sum |dw|^2 / |W|^2``.

    Args:
        rows: what :func:`calib.rotations.readers.residual_rows` or ``value_rows`` gives.

    Raises:
        RotationError: all rows are zero.
    """
    values = rows.values.float()
    power = _power(values, rows.group)
    if not bool((power > 0).any()):
        raise RotationError(
            "there is no reader with a weight that is not zero", hint="train on the samples alone"
        )
    size = power.clamp_min(torch.finfo(power.dtype).tiny).sqrt()
    # A row of zeros stays, so that layers keep equal numbers of rows, with a weight that does not
    # count.
    weights = rows.weights * power.clamp_min(1e-9 * float(power.max()))
    return replace(
        rows,
        values=values / (size if values.dim() == 2 else size.unsqueeze(-2)).unsqueeze(-1),
        weights=weights,
    )


def with_weight_rows(samples: Samples, rows: Samples, *, share: float = 1.0) -> Samples:
    """``samples`` with the readers' rows appended as tokens.

    Args:
        samples: values ``[tokens, n]`` for R1, ``[layers, kv_heads, tokens * group, n]`` for R2.
        rows: rows of the weights that read them, in the same layout.
        share: total weight of the rows relative to that of the tokens: how much ``e_W`` counts
            against ``e_x``.

    Returns:
        Rows come out with the mean square of the samples, of each layer for R2.

    Raises:
        RotationError: layouts that do not fit, rows that are all zero, or a ``share`` that is not
            positive.
    """
    same = (
        samples.values.shape[:-2] == rows.values.shape[:-2]
        and samples.values.shape[-1] == rows.values.shape[-1]
    )
    if not same or samples.group != rows.group:
        raise RotationError(
            f"rows {tuple(rows.values.shape)} do not read activations"
            f" {tuple(samples.values.shape)}",
            hint="pass the rows of this model's readers",
        )
    if not share > 0:
        raise RotationError(
            f"share {share} of the weights is not positive", hint="leave the rows out instead"
        )

    x = samples.values.float()
    appended = unit_rows(rows)
    dims = (-1, -2) if x.dim() == 2 else (-1, -2, -3)
    values = appended.values.to(x) * x.square().mean(dims, keepdim=True).sqrt()
    weights = appended.weights.to(samples.weights)
    total = samples.weights.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    return replace(
        samples,
        values=torch.cat([x, values], -2),
        weights=torch.cat([samples.weights, weights * (share * total)], -1),
    )


def _power(values: Tensor, group: int) -> Tensor:
    """Mean square of the whole row that each entry belongs to: ``[rows]``, or ``[layers, rows *
    group]``.
    """
    if values.dim() == 2:
        return values.square().mean(-1)
    return whole_inputs(values, group).square().mean(-1).repeat_interleave(group, dim=-1)
