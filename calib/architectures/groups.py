"""Which linears belong together: those that read one tensor, and of these the ones that runtimes
make one matrix of. Imports no torch.
"""

from __future__ import annotations

from itertools import groupby

from calib.architectures.wiring import Wiring


def reading_groups(wiring: Wiring, layer: int | None = None) -> list[tuple[str, ...]]:
    """The linears that may be quantized, in topological order, grouped by what they read.

    Those of one group read the very same tensor: query, key and value; then the attention output;
    gate and up; down. Experts of a 3-D parameter are a group too, though each reads some tokens
    only. Routers and gates, which stay in float, are left out.

    Args:
        wiring: that of the model.
        layer: one decoder layer; by default all.
    """
    specs = [
        (name, spec)
        for name, spec in wiring.quantizable.items()
        if layer is None or spec.layer == layer
    ]
    # Neighbours only: without norms in between (OLMo-2), attention and MLP read the residual stream
    # at two points. What reads nobody knows what reads alone.
    groups = groupby(
        specs,
        lambda entry: (
            entry[1].layer,
            entry[1].reads or entry[1].name,
            entry[1].norm,
        ),
    )
    return [tuple(name for name, _ in group) for _, group in groups]


def merged_linears(wiring: Wiring) -> dict[str, tuple[str, ...]]:
    """By linear, those that runtimes make one matrix of, itself included: query, key and value, and
    gate and up.

    Each expert is a matrix of its own, its gate and up in one already.
    """
    merged: dict[str, tuple[str, ...]] = {}
    for group in reading_groups(wiring):
        for name in group:
            experts = wiring.quantizable[name].layout == "experts"
            merged[name] = (name,) if experts else group
    return merged
