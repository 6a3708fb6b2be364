"""The decoder blocks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from calib.architectures import Architecture


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


def block_name(architecture: Architecture, layer: int) -> str:
    """Dotted path of decoder layer ``layer``."""
    return architecture.attention.partition("{i}")[0] + str(layer)


def outside_blocks(names: Sequence[str], architecture: Architecture) -> list[str]:
    """Those of the tensors ``names`` that belong to no decoder block: embeddings, final norm,
    output head.
    """
    return [
        name for name in names if not name.startswith(architecture.attention.partition("{i}")[0])
    ]
