"""Folding norms and rotations into a checkpoint exactly, and running the result."""

from __future__ import annotations

from calib.fusing.fuser import FusedModel, fuse
from calib.fusing.materialize import materialize, unloaded

__all__ = ["FusedModel", "fuse", "materialize", "unloaded"]
