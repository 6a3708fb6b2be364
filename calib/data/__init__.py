"""Calibration text: reading documents, cutting them into token rows, batching the rows, and
splitting a corpus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.data.batches import Batch, length_batches
    from calib.data.forward_loop import (
        ForwardLoop,
        create_forward_loop,
        evaluating,
        forward_loop_over,
    )
    from calib.data.rows import calibration_rows
    from calib.data.sources import resolve_source
    from calib.data.splits import Splits, split_documents
    from calib.data.tokens import tokenize

__all__ = [
    "Batch",
    "ForwardLoop",
    "Splits",
    "calibration_rows",
    "create_forward_loop",
    "evaluating",
    "forward_loop_over",
    "length_batches",
    "resolve_source",
    "split_documents",
    "tokenize",
]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "batches": (
                "Batch",
                "length_batches",
            ),
            "forward_loop": (
                "ForwardLoop",
                "create_forward_loop",
                "evaluating",
                "forward_loop_over",
            ),
            "rows": ("calibration_rows",),
            "sources": ("resolve_source",),
            "splits": (
                "Splits",
                "split_documents",
            ),
            "tokens": ("tokenize",),
        },
    )
