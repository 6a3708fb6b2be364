"""The decoder blocks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def outside_blocks(names: Sequence[str], wiring: Wiring) -> list[str]:
    """Those of the tensors ``names`` that belong to no decoder block: embeddings, final norm,
    output head.
    """
    return [name for name in names if not name.startswith(wiring.block_prefix)]
