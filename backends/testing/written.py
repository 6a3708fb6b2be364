"""A folder that a backend wrote, and how far from its model it may be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import nn

from backends.base import Backend, RuntimeMissing, RuntimeModel
from backends.testing.cases import Case
from backends.testing.models import token_rows
from backends.testing.running import FLIPS, NAIVE, WHOLE, distance, reference_logits
from calib.artifact import QuantizedModel
from calib.measure.reference import build_reference


@dataclass(frozen=True)
class Written:
    """A written folder and what was written."""

    backend: Backend
    case: Case
    folder: Path
    model: QuantizedModel

    @cached_property
    def reference(self) -> nn.Module:
        """What it must reproduce."""
        return build_reference(self.model)

    @cached_property
    def runtime(self) -> RuntimeModel:
        """It, in its runtime."""
        try:
            return self.backend.load(self.folder, self.case.target, exact=True)
        except RuntimeMissing as error:
            pytest.skip(error.message)

    @property
    def dtype(self) -> str:
        """What its target computes in."""
        return self.backend.compute_dtype(self.case.target) or "float32"

    @property
    def bound(self) -> float:
        """How far logits may be from the reference."""
        rounds = self.model.cache is not None or any(
            part.input_scheme for part in self.model.linears.values()
        )
        bound = FLIPS if rounds else WHOLE
        return bound if self.dtype == "float32" else max(bound, NAIVE * self.naive)

    @cached_property
    def naive(self) -> float:
        """How far torch is off where it computes as the target does."""
        ids = torch.stack(token_rows(12, 12, 12, 12, seed=3))
        naive = build_reference(self.model, dtype=getattr(torch, self.dtype))
        return distance(reference_logits(naive, ids), reference_logits(self.reference, ids))
