"""The decoder blocks of a model, and which of a block's linears read the same tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from calib.architectures import Wiring


@dataclass(frozen=True)
class Block:
    """One decoder layer with its weights in memory."""

    index: int
    name: str
    """Dotted path in the model, such as ``model.layers.3``."""
    module: nn.Module

    def local(self, name: str) -> str:
        """The path within the block of the module that has the path ``name`` in the model."""
        return name.removeprefix(f"{self.name}.")

    def linear(self, name: str) -> nn.Module:
        """The module that has the path ``name`` in the model."""
        return self.module.get_submodule(self.local(name))


def linear_groups(wiring: Wiring, layer: int) -> list[tuple[str, ...]]:
    """The linears of decoder layer ``layer`` that may be quantized, in topological order, grouped
    by what they read.

    Those of one group read the very same tensor: query, key and value; then the attention output;
    gate and up; down. Experts of a 3-D parameter are a group too, though each reads some tokens
    only. Routers and gates, which stay in float, are left out.
    """
    specs = [(name, spec) for name, spec in wiring.quantizable.items() if spec.layer == layer]
    # Neighbours only: without norms in between (OLMo-2), attention and MLP read the residual stream
    # at two points.
    groups = groupby(specs, lambda entry: (entry[1].reads, entry[1].norm))
    return [tuple(name for name, _ in group) for _, group in groups]


def outside_blocks(names: Sequence[str], wiring: Wiring) -> list[str]:
    """Those of the tensors ``names`` that belong to no decoder block: embeddings, final norm,
    output head.
    """
    return [name for name in names if not name.startswith(wiring.block_prefix)]
