"""Ways to run a written model, and how far it may be from the torch reference.

Figures are relative L2 over all logits. Activations that are quantized can flip to the next step
where sums differ in the last bit, which amplifies, so a whole model is held loosely then; each
linear on identical inputs is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backends.base import RuntimeModel

LINEAR: dict[str, float] = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
"""One linear on identical inputs: in float32 the order of a sum of a few hundred products; else a
few eps of the dtype (9.8e-4 and 7.8e-3), for the inputs, the products and the result are rounded to
it."""
FLIPS = 5e-2
"""A whole tiny model with quantized activations. One flip was seen to cost 1.2e-2; a model that
lost a rotation, a bias or a mask is off by 0.3 and more."""
WHOLE = 1e-5
"""A whole tiny model whose activations stay in float, in float32: nothing is rounded to integers on
the way.
"""
NAIVE = 2.0
"""A target that computes in half precision, against how far torch itself is off in that precision:
every value is rounded, and activations flip all the time. It may do twice as badly, for it rounds
in other places."""


def reference_logits(reference: nn.Module, ids: Tensor) -> Tensor:
    """Logits ``[B, S, V]`` of the torch reference for unpadded ``ids`` ``[B, S]``."""
    with torch.no_grad():
        logits: Tensor = reference(input_ids=ids, use_cache=False).logits
    return logits


def prefill(runtime: RuntimeModel, ids: Tensor) -> Tensor:
    """Logits of one pass."""
    return runtime.forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids))[0]


def decode(runtime: RuntimeModel, ids: Tensor, prefix: int) -> Tensor:
    """Logits of a pass over ``prefix`` tokens and then of one token at a time, from the cache."""
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids)
    logits, past = runtime.forward(ids[:, :prefix], mask[:, :prefix], positions[:, :prefix])
    steps = [logits]
    for step in range(prefix, ids.shape[1]):
        here = slice(step, step + 1)
        logits, past = runtime.forward(ids[:, here], mask[:, : step + 1], positions[:, here], past)
        steps.append(logits)
    return torch.cat(steps, dim=1)


def padded(runtime: RuntimeModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """Logits of ``rows`` of different lengths, run as one left-padded batch, without those of the
    padding.
    """
    longest = max(row.numel() for row in rows)
    ids = torch.stack([nn.functional.pad(row, (longest - row.numel(), 0)) for row in rows])
    mask = torch.stack(
        [nn.functional.pad(torch.ones_like(row), (longest - row.numel(), 0)) for row in rows]
    )
    logits, _ = runtime.forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    return [
        row_logits[longest - row.numel() :] for row, row_logits in zip(rows, logits, strict=True)
    ]


def distance(actual: Tensor, reference: Tensor) -> float:
    """Relative L2 of two tensors of one shape, in float64."""
    return float((actual.double() - reference.double()).norm() / reference.double().norm())


def check_close(actual: Tensor, reference: Tensor, bound: float, what: str) -> None:
    """Hold :func:`distance` to a bound.

    Raises:
        AssertionError: with the figure.
    """
    if actual.shape != reference.shape:
        raise AssertionError(
            f"{what}: shape {list(actual.shape)} instead of {list(reference.shape)}"
        )
    error = distance(actual, reference)
    if not error <= bound:  # also if it is NaN
        raise AssertionError(f"{what}: relative L2 {error:.1e}, more than {bound:.0e}")
