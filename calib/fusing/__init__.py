"""Folding norms and rotations into a checkpoint exactly, and running the result."""

from __future__ import annotations

from calib.fusing.fuser import FusedModel, fuse
from calib.fusing.materialize import materialize, unloaded, with_prefix
from calib.fusing.source import check_contents

__all__ = ["FusedModel", "check_contents", "fuse", "materialize", "unloaded", "with_prefix"]
