"""Rounding the weights of linears: to nearest, with searched limits, by GPTQ, by AdaRound."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.weights.algorithms import WeightAlgorithm, algorithm_named
    from calib.weights.moments import Moment, observe_moments
    from calib.weights.rounded import Rounded

__all__ = ["Moment", "Rounded", "WeightAlgorithm", "algorithm_named", "observe_moments"]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "algorithms": (
                "WeightAlgorithm",
                "algorithm_named",
            ),
            "moments": (
                "Moment",
                "observe_moments",
            ),
            "rounded": ("Rounded",),
        },
    )
