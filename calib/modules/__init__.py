"""The modules of a torch network: finding them, replacing them, watching them, and the attention
that they compute. Knows no rotation, no scheme and no artifact.
"""

from __future__ import annotations

from calib.modules.paths import (
    get_submodule,
    is_conv1d,
    is_linear,
    linears_but_head,
    set_submodule,
    weight_of,
)
from calib.modules.watch import Run, Watch, watching

__all__ = [
    "Run",
    "Watch",
    "get_submodule",
    "is_conv1d",
    "is_linear",
    "linears_but_head",
    "set_submodule",
    "watching",
    "weight_of",
]
