"""What a run writes: a quantized model, made now or by an earlier run, with what is at hand to
compare it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.artifact import QuantizedModel
from calib.errors import RotqError
from calib.fusing import FusedModel, with_prefix
from calib.smoothing.smooth import fold_all
from exporter.recipe import Recipe
from exporter.run.stopwatch import Stopwatch
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

    def floats(
        self, dtype: torch.dtype, clock: Stopwatch
    ) -> tuple[Source | None, FusedModel | None]:
        """The float model before and after rotation, the latter in ``dtype``, where they are at
        hand.

        Raises:
            RotqError: they must be, and are not.
        """
        if self.source is None:
            return None, None
        if self.fused is not None and self.fused.dtype == dtype:
            return self.source, self.fused

        try:
            with clock.stage("fuse"):
                fused = self.source.fuse(
                    self.quantized.rotations,
                    dtype=dtype,
                    fold_norms=self.quantized.norms_folded,
                    device=self.device,
                    progress=clock.progress,
                )
            fused = fold_all(fused, self.quantized.smoothing)
            prefix = self.quantized.prefix
            if prefix is not None:
                fused = with_prefix(fused, prefix.tokens, prefix.reason, self.device)
            return self.source, fused
        except RotqError:
            if not self.travelled:
                raise
            return None, None
