"""Everything that makes numbers: rotations, statistics, calibration, scales, and the artifact that
holds them.

The functions that users of ModelOpt's and of QAT toolchains know by name are here directly; each
loads what it needs on first use, so that ``import calib`` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names
from calib._names.moved import install

if TYPE_CHECKING:
    from calib.arithmetic.scales import compute_scale, convert_to_scale
    from calib.data.forward_loop import create_forward_loop
    from calib.modelopt.quantize import modelopt_quantize
    from calib.modules.paths import get_submodule

__all__ = [
    "compute_scale",
    "convert_to_scale",
    "create_forward_loop",
    "get_submodule",
    "modelopt_quantize",
]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "arithmetic.scales": ("compute_scale", "convert_to_scale"),
            "data.forward_loop": ("create_forward_loop",),
            "modelopt.quantize": ("modelopt_quantize",),
            "modules.paths": ("get_submodule",),
        },
    )

install()
