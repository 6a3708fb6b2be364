"""Which linears belong together: those that read one tensor, and of these the ones that runtimes
make one matrix of. Imports no torch.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from calib.architectures.architecture import Architecture
from calib.architectures.experts import quantizable_linears


def reading_groups(
    architecture: Architecture, config: Any, layer: int | None = None
) -> list[tuple[str, ...]]:
    """The linears that may be quantized, in topological order, grouped by what they read.

    Those of one group read the very same tensor: query, key and value; then the attention output;
    gate and up; down. Experts of a 3-D parameter are a group too, though each reads some tokens
    only. Routers and gates, which stay in float, are left out.

    Args:
        architecture: the model's table entry.
        config: its Hugging Face config.
        layer: one decoder layer; by default all.
    """
    specs = [
        (name, spec)
        for name, spec in quantizable_linears(architecture, config).items()
        if layer is None or spec.layer == layer
    ]
    # Neighbours only: without norms in between (OLMo-2), attention and MLP read the residual stream
    # at two points.
    groups = groupby(specs, lambda entry: (entry[1].layer, entry[1].reads, entry[1].norm))
    return [tuple(name for name, _ in group) for _, group in groups]


def merged_linears(architecture: Architecture, config: Any) -> dict[str, tuple[str, ...]]:
    """By linear, those that runtimes make one matrix of, itself included: query, key and value, and
    gate and up.

    Each expert is a matrix of its own, its gate and up in one already.
    """
    specs = quantizable_linears(architecture, config)
    merged: dict[str, tuple[str, ...]] = {}
    for group in reading_groups(architecture, config):
        for name in group:
            merged[name] = (name,) if specs[name].layout == "experts" else group
    return merged
