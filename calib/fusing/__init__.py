"""Folding norms and rotations into a checkpoint exactly, and running the result."""

from __future__ import annotations

from calib.fusing.contents import check_contents
from calib.fusing.fuser import FusedModel, fuse
from calib.fusing.materialize import materialize, unloaded, with_prefix

__all__ = ["FusedModel", "check_contents", "fuse", "materialize", "unloaded", "with_prefix"]
