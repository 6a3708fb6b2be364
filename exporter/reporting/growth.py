"""A folder whose weights take more room than the checkpoint did, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backends.base import StoredTensor
from exporter.reporting.report import LayerSummary
from exporter.reporting.summary import human_bytes, size_words

_NAMED = 3
"""Tensors that are named; the rest of them is small beside these, or too many."""


def growth_warning(
    layers: LayerSummary, contents: Callable[[], Sequence[StoredTensor]]
) -> str | None:
    """What to say of a folder that is larger than its checkpoint; ``None`` where it is not.

    Args:
        layers: says how large both are.
        contents: gives every tensor of the folder; called only where one is to be named.
    """
    before, after = layers.bytes_before, layers.bytes_after
    if after <= before:
        return None

    floats = [tensor for tensor in contents() if tensor.kind == "float weight"]
    largest = sorted(floats, key=lambda tensor: tensor.nbytes, reverse=True)[:_NAMED]
    named = ", ".join(
        f"{tensor.name} ({tensor.dtype}, {human_bytes(tensor.nbytes)})" for tensor in largest
    )
    return (
        f"the written weights take more room than the checkpoint: {size_words(before, after)}; the"
        f" largest that stayed in float: {named}"
    )
