"""SmoothQuant and AWQ: moving the size of input channels into the weights, folded into what is in
front of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.smoothing.groups import SmoothingGroup, smoothing_groups
    from calib.smoothing.methods import Awq, Smoothing, SmoothQuant, smoothing_named
    from calib.smoothing.observe import GroupInputs, observe_channels

__all__ = [
    "Awq",
    "GroupInputs",
    "SmoothQuant",
    "Smoothing",
    "SmoothingGroup",
    "observe_channels",
    "smoothing_groups",
    "smoothing_named",
]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "groups": (
                "SmoothingGroup",
                "smoothing_groups",
            ),
            "methods": (
                "Awq",
                "SmoothQuant",
                "Smoothing",
                "smoothing_named",
            ),
            "observe": (
                "GroupInputs",
                "observe_channels",
            ),
        },
    )
