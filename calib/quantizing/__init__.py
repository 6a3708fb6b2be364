"""From a fused float model to the artifact: the plan, what is observed, the calibrator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.quantizing.calibrator import Calibrator, quantize_model
    from calib.quantizing.observation import Observed, Watchlist
    from calib.quantizing.plan import Quantization, customised, resolve

__all__ = [
    "Calibrator",
    "Observed",
    "Quantization",
    "Watchlist",
    "customised",
    "quantize_model",
    "resolve",
]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "calibrator": (
                "Calibrator",
                "quantize_model",
            ),
            "observation": (
                "Observed",
                "Watchlist",
            ),
            "plan": (
                "Quantization",
                "customised",
                "resolve",
            ),
        },
    )
