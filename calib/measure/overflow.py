"""Which activation a short dtype cannot hold: where logits in it are not finite, this says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from calib.measure.perplexity import model_logits
from calib.modules.watch import watching


@dataclass(frozen=True)
class Overflow:
    """The first activation that is beyond a dtype."""

    module: str
    """Whose input it is."""
    largest: float
    """Its largest magnitude over all rows, in float32."""
    dtype: torch.dtype

    @property
    def share(self) -> float:
        """The largest magnitude over the largest number of the dtype."""
        return self.largest / torch.finfo(self.dtype).max

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        limit = torch.finfo(self.dtype).max
        return (
            f"the input of {self.module} reaches {self.largest:.3g}, and {name} ends at {limit:g}"
        )


def first_overflow(
    reference: nn.Module, rows: Sequence[Tensor], dtype: torch.dtype
) -> Overflow | None:
    """The first module, in the order of a pass, whose input does not fit ``dtype``.

    Args:
        reference: the model, computing in float32.
        rows: token rows ``[tokens]``.
        dtype: a shorter dtype.
    """
    largest: dict[str, float] = {}

    def look(name: str, x: Tensor) -> None:
        if x.is_floating_point():
            largest[name] = max(largest.get(name, 0.0), float(x.abs().amax()))

    owners = [
        name
        for name, module in reference.named_modules()
        if not isinstance(module, nn.Embedding) and (module._parameters or module._buffers)
    ]
    logits = model_logits(reference)
    with watching(reference, inputs={name: partial(look, name) for name in owners}, optional=True):
        for row in rows:
            logits(row.unsqueeze(0))
    found = (Overflow(name, value, dtype) for name, value in largest.items())
    return next((overflow for overflow in found if not overflow.share <= 1), None)
