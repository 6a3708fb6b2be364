"""How far two models are apart: the torch reference of an artifact, floors, perplexity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.measure.floor import (
        Difference,
        Distances,
        distances,
        naive_floor,
        one_flip_floor,
        settled,
        split_sum_floor,
    )
    from calib.measure.perplexity import Comparison, Perplexity, compare_logits
    from calib.measure.reference import ReferenceLinear, build_reference, split_sums

__all__ = [
    "Comparison",
    "Difference",
    "Distances",
    "Perplexity",
    "ReferenceLinear",
    "build_reference",
    "compare_logits",
    "distances",
    "naive_floor",
    "one_flip_floor",
    "settled",
    "split_sum_floor",
    "split_sums",
]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "floor": (
                "Difference",
                "Distances",
                "distances",
                "naive_floor",
                "one_flip_floor",
                "settled",
                "split_sum_floor",
            ),
            "perplexity": (
                "Comparison",
                "Perplexity",
                "compare_logits",
            ),
            "reference": (
                "ReferenceLinear",
                "build_reference",
                "split_sums",
            ),
        },
    )
