"""One rotation for what a linear layer reads *and* for its weight: rows of the weight are tokens too.

With activation and weight both quantized, ``y = x W^T`` becomes ``(x + dx) (W + dW)^T``, so to first order

    |dy|^2 = |dx W^T|^2 + |x dW^T|^2.

A rotation turns ``x`` into ``x R`` and ``W`` into ``W R``, leaves the exact product alone, and makes both errors nearly
white, of relative size ``e_x = |dx|^2 / |x|^2`` and ``e_W = |dW|^2 / |W|^2``. Each term is then the same
``|x|^2 |W|^2 / n`` times its relative error, and ``e_x + e_W`` is what to minimise. A row of ``W R`` quantized with its
own scale is exactly a token quantized with its own scale. Trained on activations alone a rotation pays with the weights
part of what it gains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calib.errors import RotationError


def with_weight_rows(
    samples: Tensor, readers: Sequence[Tensor], *, weights: Tensor | None = None, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Samples and token weights for :func:`calib.rotations.train.train_rotation` with the readers' rows appended.

    Args:
        samples: activations ``[tokens, n]``, floating.
        readers: weights ``[out, n]`` of the linears that read them, norm gains folded in. Each matrix counts by its
            relative error ``sum |dw|^2 / |W|^2`` over rows ``w``: rows come out with the mean square of the samples, so
            that no objective is ruled by a few large ones, and with a weight in proportion to their own ``|w|^2``.
        weights: token weights ``[tokens]``; ``None``: all equal.
        share: total weight of the rows relative to that of the tokens: how much ``e_W`` counts against ``e_x``.

    Returns:
        ``[tokens + rows, n]`` and positive weights ``[tokens + rows]``, float32; rows that are zero are left out.

    Raises:
        RotationError: shapes that do not fit, no reader that is not all zero, or a ``share`` that is not positive.
    """
    n = samples.shape[-1]
    if samples.dim() != 2 or any(w.dim() != 2 or w.shape[-1] != n for w in readers):
        raise RotationError(
            f"readers {[tuple(w.shape) for w in readers]} do not read activations {tuple(samples.shape)}",
            hint="pass [tokens, channels] and weights [out, channels]; a Conv1D stores the transpose",
        )
    if not share > 0:
        raise RotationError(f"share {share} of the weights is not positive", hint="leave the rows out instead")
    x = samples.float()
    power = x.square().mean().sqrt()
    tokens = torch.ones(len(x)).to(x) if weights is None else weights.to(x)
    rows, row_weights = [], []
    for matrix in readers:
        size = torch.linalg.vector_norm(matrix.to(x), dim=-1)
        used = size > 0
        rows.append(matrix.to(x)[used] * (power * n**0.5 / size[used, None]))
        row_weights.append(size[used].square() * (len(matrix) / size.square().sum().clamp_min(1e-30)))
    heavy = torch.cat(row_weights)
    if len(heavy) == 0:
        raise RotationError("there is no reader with a weight that is not zero", hint="train on the samples alone")
    return torch.cat([x, *rows]), torch.cat([tokens, heavy * (share * tokens.sum() / heavy.sum())])
