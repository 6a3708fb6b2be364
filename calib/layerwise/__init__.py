"""Calibrating a model block by block, so that neither the model nor the checkpoint is ever whole in
memory.
"""

from __future__ import annotations

from calib.layerwise.blocks import Block
from calib.layerwise.flow import Flow
from calib.layerwise.protocol import BlockQuantizer
from calib.layerwise.runner import CalibrationRunner
from calib.layerwise.shards import ShardStore

__all__ = ["Block", "BlockQuantizer", "CalibrationRunner", "Flow", "ShardStore"]
