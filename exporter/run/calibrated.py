"""What a run writes: a quantized model, made now or by an earlier run, with what is at hand to
compare it with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.artifact import QuantizedModel
from calib.errors import RotqError
from calib.fusing import FusedModel, with_prefix
from calib.layerwise.prefix import with_prefix_blockwise
from calib.layerwise.smoothed import fold_all_lazily
from calib.process.progress import Progress, silent
from calib.rotations.rotation_set import RotationSet
from calib.smoothing.smooth import fold_all
from exporter.recipe import Recipe
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import WorkDir
from exporter.source import Source


@dataclass(frozen=True)
class Calibrated:
    """A quantized model and its original."""

    recipe: Recipe
    """What it was made by, and is to be written by."""
    quantized: QuantizedModel
    """Its provenance holds the gate's table where there was a choice."""
    device: torch.device
    """Where the original runs."""
    source: Source | None = None
    """The original, where it is at hand."""
    fused: FusedModel | None = None
    """The rotated float model, where this run has fused it."""
    evaluation: Sequence[Tensor] | None = None
    """Token rows to measure on; ``None``: nothing is to be compared."""
    travelled: bool = False
    """Whether the model is an artifact, which may be written and run without its original."""
    work: WorkDir | None = None
    """What keeps rungs of parity that are finished, if anything."""

    def floats(
        self, dtype: torch.dtype, clock: Stopwatch
    ) -> tuple[Source | None, FusedModel | None]:
        """The float model before and after rotation, the latter in ``dtype``, where they are at
        hand; of a model that was quantized block by block its tensors are computed on access.

        Raises:
            RotqError: they must be, and are not.
        """
        if self.source is None:
            return None, None
        if self.fused is not None and self.fused.dtype == dtype:
            return self.source, self.fused

        prefix = self.quantized.prefix
        try:
            with clock.stage("fuse"):
                fused = fused_again(
                    self.source,
                    self.quantized.rotations,
                    dtype,
                    fold_norms=self.quantized.norms_folded,
                    smoothing=self.quantized.smoothing,
                    prefix=() if prefix is None else prefix.tokens,
                    reason="" if prefix is None else prefix.reason,
                    device=self.device,
                    by_blocks=self.quantized.by_blocks,
                    progress=clock.progress,
                )
            return self.source, fused
        except RotqError:
            if not self.travelled:
                raise
            return None, None


def fused_again(
    source: Source,
    rotations: RotationSet,
    dtype: torch.dtype,
    *,
    fold_norms: bool,
    smoothing: Mapping[str, Tensor],
    prefix: Sequence[int],
    reason: str,
    device: torch.device | str = "cpu",
    by_blocks: bool = False,
    progress: Progress = silent,
) -> FusedModel:
    """The rotated float model that a quantized one was made from.

    Args:
        source: the original.
        rotations: all of them.
        dtype: of the result.
        fold_norms: whether norms are folded where no R1 needs it.
        smoothing: scales that are folded, by the name of their group.
        prefix: ids of the tokens before every sequence.
        reason: recorded with them.
        device: where it is computed.
        by_blocks: compute tensors on access, and never all of them at once.
        progress: called after every weight.
    """
    fused = source.fuse(
        rotations,
        dtype=dtype,
        fold_norms=fold_norms,
        device=device,
        lazy=by_blocks,
        progress=progress,
    )
    if by_blocks:
        smoothed = fold_all_lazily(fused, smoothing)
        return with_prefix_blockwise(smoothed, prefix, reason, device)
    return with_prefix(fold_all(fused, smoothing), prefix, reason, device)
