"""Everything that makes numbers: rotations, statistics, calibration, scales, and the artifact that
holds them.

The functions that users of ModelOpt's and of QAT toolchains know by name are here directly; each
loads what it needs on first use, so that ``import calib`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_HOMES = {
    "compute_scale": "calib.arithmetic.scales",
    "convert_to_scale": "calib.arithmetic.scales",
    "create_forward_loop": "calib.data.forward_loop",
    "get_submodule": "calib.modules.paths",
    "modelopt_quantize": "calib.modelopt.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calib' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
