"""Whole tiny models in ONNX Runtime against the torch reference, in every way a model is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from calib.architectures import Kind
from calib.artifact import QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.measure.reference import build_reference
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.schemes import scheme_named
from tests.tiny import PROVENANCE, fuse_tiny, make_tiny, relative_l2, token_rows

LENGTHS = (12, 7, 5)
"""Of the rows of a batch; the shorter ones are padded on the left."""
PREFILL = 6
"""Tokens of the longest row that are run at once; the others follow, one by one unless a test says
otherwise.
"""


@dataclass(frozen=True)
class Batch:
    """Left-padded rows."""

    ids: Tensor
    mask: Tensor
    positions: Tensor

    @property
    def real(self) -> Tensor:
        """Where a token is."""
        return self.mask.bool()


def batch() -> Batch:
    """Rows of :data:`LENGTHS`."""
    longest = max(LENGTHS)
    ids = torch.stack([pad(row, (longest - row.numel(), 0)) for row in token_rows(LENGTHS, seed=4)])
    mask = torch.stack(
        [pad(torch.ones(length, dtype=torch.long), (longest - length, 0)) for length in LENGTHS]
    )
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))


def quantized(
    config: Any,
    kinds: Sequence[Kind] = ("r1", "r2", "r3", "r4"),
    scheme: str = "int8-weight-only",
    *,
    fold_norms: bool = True,
    **settings: Any,
) -> QuantizedModel:
    """The artifact of a tiny model; ``settings`` go to :func:`calib.quantizing.plan.resolve`.

    Tests that leave ``kinds`` as they are share one trace a config.
    """
    fused = fuse_tiny(make_tiny(config), kinds, fold_norms=fold_norms)
    how = resolve(scheme_named(scheme), fused.wiring, **settings)
    return quantize_model(
        fused, how, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
    )


@dataclass(frozen=True)
class Compared:
    """Logits of the reference and of the runtime; where a token is real, unless only those of the
    last are given.
    """

    wanted: Tensor
    prefill: Tensor
    decoded: Tensor
    cache: list[Tensor]

    @property
    def error(self) -> float:
        """The larger error of the two ways to run it."""
        return max(relative_l2(self.prefill, self.wanted), relative_l2(self.decoded, self.wanted))


def compare(
    model: QuantizedModel,
    folder: Path,
    *,
    target: str = "ort",
    logits: Literal["all", "last"] = "all",
    kv_buffer: Literal["grown", "shared"] = "grown",
    step: int = 1,
) -> Compared:
    """Write ``model``, run it over :func:`batch` at once and ``step`` tokens at a time, and run the
    reference.
    """
    OnnxBackend().write(model, folder, WriteOptions(target, logits=logits, kv_buffer=kv_buffer))
    runtime = OnnxBackend().load(folder, target, exact=True)
    rows = batch()
    with torch.no_grad():
        output = build_reference(model)(
            input_ids=rows.ids, attention_mask=rows.mask, position_ids=rows.positions
        )
    whole, cache = runtime.forward(rows.ids, rows.mask, rows.positions)
    found, past = runtime.forward(
        rows.ids[:, :PREFILL], rows.mask[:, :PREFILL], rows.positions[:, :PREFILL]
    )
    steps = [found]
    for start in range(PREFILL, rows.ids.shape[1], step):
        here = slice(start, start + step)
        found, past = runtime.forward(
            rows.ids[:, here], rows.mask[:, : here.stop], rows.positions[:, here], past
        )
        steps.append(found)
    if logits == "last":
        assert {tensor.shape[1] for tensor in (whole, *steps)} == {1}
        return Compared(output.logits[:, -1:], whole, found, cache)
    return Compared(
        output.logits[rows.real], whole[rows.real], torch.cat(steps, dim=1)[rows.real], cache
    )
