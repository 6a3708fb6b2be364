"""Rung 1: the original float model against the rotated one, in memory or reloaded from a folder.

This is the one proof that folding is exact, of ``rotq export``, ``verify`` and ``rotate``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.errors import RotationError
from calib.fusing import materialize
from calib.measure.floor import Difference
from calib.measure.overflow import first_overflow
from calib.measure.perplexity import model_logits
from calib.network.checkpoint import load_config
from calib.network.original import load_network
from calib.network.prefix import attach_prefix, compute_prefix
from calib.progress import Progress, silent, track
from exporter.parity.rows import NO_ORIGINAL, not_run, row
from exporter.parity.subject import Subject
from exporter.reporting.report import ParityRow
from exporter.source import Source

FOLD_BOUND = 1e-5
"""Relative L2 of logits in float32: rotating in float64 and rounding once costs a few ulp (6e-8)
per layer, about 3e-7 in all."""
ROUNDING_FACTOR = 2.0
"""In a shorter dtype: how much farther from the float32 original the rotated model may be than the
original in that dtype. Its weights are rounded once more, an error of the size of those that
rounding activations makes anyway."""

_NAME, _METRIC = "original float vs rotated float", "relative L2"


@dataclass(frozen=True)
class FoldError:
    """How far a rotated model is from the original in float32: relative L2 of logits."""

    rotated: float
    rounded: float | None
    """Of the original itself in the dtype of the rotated one; ``None`` where that is float32."""

    @property
    def bound(self) -> float:
        """What :attr:`rotated` is held to."""
        return FOLD_BOUND if self.rounded is None else ROUNDING_FACTOR * self.rounded


def fold_error(
    original: nn.Module,
    rotated: nn.Module,
    rows: Sequence[Tensor],
    dtype: torch.dtype,
    progress: Progress = silent,
) -> FoldError:
    """Compare the logits of two models.

    Args:
        original: in float32.
        rotated: in ``dtype``, on the same device.
        rows: token rows ``[tokens]``.
        dtype: what the rotated model computes in.
        progress: called after every row.
    """
    models = {"rotated": rotated}
    if dtype is not torch.float32:
        models["rounded"] = parameters_in(deepcopy(original), dtype)
    expected = model_logits(original)
    differences = {name: Difference() for name in models}

    for tokens in track(rows, "compare", len(rows), progress):
        ids = tokens.unsqueeze(0)
        logits = expected(ids)
        for name, model in models.items():
            differences[name].add(model_logits(model)(ids), logits)
    lost = {name: difference.value for name, difference in differences.items()}
    return FoldError(lost["rotated"], lost.get("rounded"))


def fold_row(subject: Subject) -> ParityRow:
    """The figure of rung 1, of an export."""
    if subject.source is None or subject.fused is None:
        return not_run(1, _NAME, _METRIC, NO_ORIGINAL)
    original = subject.source.original(subject.device)
    if subject.fused.prefix is not None:
        # computed anew by the original, so that what was computed in the rotated basis is judged
        wiring, tokens = subject.source.wiring, subject.fused.prefix.tokens
        attach_prefix(original, wiring, compute_prefix(original, wiring, tokens))
    rotated = materialize(subject.fused).to(subject.device)
    error = fold_error(original, rotated, subject.proof_rows, subject.quantized.dtype)
    note = ""
    if error.rounded is not None:
        note = f"both in {subject.dtype_name}; the original itself loses {error.rounded:.3g} in it"
    return row(1, _NAME, _METRIC, error.rotated, error.bound, note)


def check_folder(
    folder: Path,
    source: Source,
    rows: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = silent,
) -> list[ParityRow]:
    """The figures of rung 1, of a rotated folder as any user would load it.

    Args:
        folder: a checkpoint folder.
        source: the original.
        rows: token rows ``[tokens]``.
        dtype: what the folder is stored and run in.
        device: where both run.
        progress: called after every row.

    Raises:
        CheckpointError: the folder lacks or has too many tensors.
        RotationError: a figure misses its bound.
    """
    rotated = load_network(folder, load_config(folder), dtype=dtype, device=device, complete=True)
    original = source.original(device)
    error = fold_error(original, rotated, rows, dtype, progress)

    name = str(dtype).removeprefix("torch.")
    against = "original in float32"
    compared = f"rotated folder in {name}, {against}"
    figures = [row(1, compared, _METRIC, error.rotated, error.bound)]
    if error.rounded is not None:
        figures.append(row(1, f"original in {name}, {against}", _METRIC, error.rounded, None))
    overflow = None if math.isfinite(error.rotated) else first_overflow(original, rows, dtype)
    if overflow is not None:
        raise RotationError(
            f"the rotated folder computes no finite logits in {name}: {overflow}",
            hint="give --dtype bfloat16 or float32",
        )
    if not figures[0].passed:
        raise RotationError(
            "the rotated folder does not compute what the original does: relative L2 of logits "
            f"{error.rotated:.3g}, bound {error.bound:.3g}",
            hint="this should not happen: please report it, with the model and the recipe",
        )
    return figures


def parameters_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` in ``dtype`` as from_pretrained gives it: buffers such as rotary frequencies stay
    in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
