"""Folding the gain and bias of a norm into the linears that read it.

A norm gives ``n(x) * g + b`` with ``n(x)`` free of parameters, and a reader computes

    y = (n(x) * g + b) W^T + c = n(x) (W diag(g))^T + (c + b W^T)

so the reader takes ``W diag(g)`` and ``c + b W^T`` and the norm keeps gain one and its own eps.
RMSNorm without gain commutes with every rotation, LayerNorm without gain with those that fix the
all-ones vector. A LayerNorm bias whose readers have no bias to take it (the output head) stays in
the norm, in front of the folded gain: ``(b / g) R1``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.rotations.rotation_set import Rotation


@dataclass(frozen=True)
class FoldedNorm:
    """What becomes of one norm; all tensors float64 ``[hidden]``."""

    gain: Tensor
    """Multiplies the columns of every reader."""
    shift: Tensor | None
    """The bias that the readers take; ``None`` if there is none or it stays in the norm."""
    kept_bias: Tensor | None
    """The bias that the norm keeps; ``None`` if the norm has none."""
    refusal: str | None = None
    """Why the stock model cannot hold the fold: some reader needs a bias parameter that it does not
    have.
    """


def fold_norm(
    name: str,
    gain: Tensor,
    bias: Tensor | None,
    *,
    readers_have_bias: bool,
    r1: Rotation | None,
    dtype: torch.dtype,
) -> FoldedNorm:
    """Decide where the gain and bias of the norm ``name`` go.

    Args:
        name: module name, for the reason of a refusal.
        gain: what the norm multiplies by (any offset added), float64 ``[hidden]``.
        bias: what it adds, float64 ``[hidden]``, or ``None``.
        readers_have_bias: whether every reader can take the bias.
        r1: rotation of the residual stream, which the kept bias follows.
        dtype: dtype that the folded model is stored in.
    """
    if bias is None:
        return FoldedNorm(gain, shift=None, kept_bias=None)
    nothing = torch.zeros_like(bias)
    if readers_have_bias:
        return FoldedNorm(gain, shift=bias, kept_bias=nothing)
    # A channel with neither gain nor bias carries nothing, whatever its quotient.
    quotient = torch.where(bias == 0, nothing, bias / gain)
    kept = quotient if r1 is None else r1.apply(quotient)
    if _survives_rounding(kept, gain, bias, r1, dtype):
        return FoldedNorm(gain, shift=None, kept_bias=kept)
    reason = (
        f"the bias of {name} would have to stay in the norm as bias / gain, which {dtype} cannot"
        " hold because some gains are tiny, and what reads it has no bias parameter in the stock"
        " model"
    )
    return FoldedNorm(gain, shift=bias, kept_bias=nothing, refusal=reason)


def _survives_rounding(
    kept: Tensor, gain: Tensor, bias: Tensor, r1: Rotation | None, dtype: torch.dtype
) -> bool:
    """Whether rounding the kept bias to ``dtype`` costs no more than rounding the norm's own output
    would.

    R1 spreads the rounding error of ``kept`` over all channels, and the readers see it through
    ``R1^T`` and the gain. The output of the norm has an expected squared length of ``|g|^2 +
    |b|^2``, so the error may be ``eps`` times its root. A float64 model is held to the test in
    float32: the ratio is the same, and float64 would not show it.
    """
    probe = torch.float32 if dtype is torch.float64 else dtype
    rounded = kept.to(probe).double()
    if not bool(torch.isfinite(rounded).all()):
        return False
    error = rounded - kept
    error = error if r1 is None else error @ r1.dense().to(error).mT
    scale = torch.linalg.vector_norm(torch.cat([gain, bias]))
    return bool(torch.linalg.vector_norm(error * gain) <= torch.finfo(probe).eps * scale)
