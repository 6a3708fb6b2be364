"""Calibration through NVIDIA ModelOpt: the only package of rotq that imports ``modelopt``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.modelopt.config import modelopt_config
    from calib.modelopt.quantize import input_amax, modelopt_quantize, read_input_amax

__all__ = ["input_amax", "modelopt_config", "modelopt_quantize", "read_input_amax"]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "config": ("modelopt_config",),
            "quantize": (
                "input_amax",
                "modelopt_quantize",
                "read_input_amax",
            ),
        },
    )
