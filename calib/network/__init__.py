"""The float network: its checkpoint, its module tree, attention, online rotations, experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.network.checkpoint import Checkpoint, load_config, open_checkpoint
    from calib.network.layout import StockTensors, oriented
    from calib.network.online import attach_online
    from calib.network.skeleton import build_on_meta, build_skeleton, portable_config

__all__ = [
    "Checkpoint",
    "StockTensors",
    "attach_online",
    "build_on_meta",
    "build_skeleton",
    "load_config",
    "open_checkpoint",
    "oriented",
    "portable_config",
]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "checkpoint": (
                "Checkpoint",
                "load_config",
                "open_checkpoint",
            ),
            "layout": (
                "StockTensors",
                "oriented",
            ),
            "online": ("attach_online",),
            "skeleton": (
                "build_on_meta",
                "build_skeleton",
                "portable_config",
            ),
        },
    )
