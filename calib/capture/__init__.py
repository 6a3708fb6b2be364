"""Streaming capture of the activations that rotations are trained on, in memory that does not grow
with the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.capture.datasets import R1Dataset, R2Dataset
    from calib.capture.result import Samples, SiteStatistics
    from calib.capture.session import capture
    from calib.capture.sites import CaptureConfig, CaptureSite, estimate_bytes
    from calib.capture.storage import Capture

__all__ = [
    "Capture",
    "CaptureConfig",
    "CaptureSite",
    "R1Dataset",
    "R2Dataset",
    "Samples",
    "SiteStatistics",
    "capture",
    "estimate_bytes",
]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "datasets": (
                "R1Dataset",
                "R2Dataset",
            ),
            "result": (
                "Samples",
                "SiteStatistics",
            ),
            "session": ("capture",),
            "sites": (
                "CaptureConfig",
                "CaptureSite",
                "estimate_bytes",
            ),
            "storage": ("Capture",),
        },
    )
