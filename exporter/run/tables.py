"""The token embedding and the output head of a model that is mostly these: quantized unless told
otherwise.

In float32 both tables of a small model with a large vocabulary outweigh all of its int8 linears:
SmolLM2-135M would become larger than its bfloat16 checkpoint. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calib.schemes import FLOAT, LINEAR_SCHEMES, LinearScheme
from exporter.recipe import Recipe
from exporter.run.destination import Destination

TABLE_SCHEME = "int8-weight-only"
"""One scale for a row, and the input in float: of the head's, which is the sharpest of all, nothing
is lost, and a row of the embedding has none.
"""
LEAST_SHARE = 0.15
"""Of a model's parameters: below it, an int8 folder would shrink by less than a third, from 0.85 +
4 x 0.15 bytes for each parameter to 1."""
LEAST_ELEMENTS = 2**24
"""Of both tables: below it less than 48 MiB are saved, which are worth no loss, however small."""


@dataclass(frozen=True)
class Tables:
    """The token embedding and the output head of one model."""

    embedding: str
    """Module name."""
    head: str
    """Module name."""
    elements: int
    """Of both, also where one is tied to the other."""
    parameters: int
    """Of the model with both."""

    @property
    def large(self) -> bool:
        """Whether they are worth quantizing."""
        return self.elements >= LEAST_ELEMENTS and self.elements >= LEAST_SHARE * self.parameters

    @property
    def linears(self) -> dict[str, LinearScheme]:
        """How they would be quantized."""
        return dict.fromkeys((self.embedding, self.head), LINEAR_SCHEMES[TABLE_SCHEME])


def with_tables(
    recipe: Recipe, tables: Tables, destination: Destination, config: Mapping[str, Any]
) -> Recipe:
    """``recipe`` with large tables quantized, as overrides that its own win over: ``lm_head=float``
    keeps the head as it is.

    Nothing is added where the recipe quantizes nothing, or where a target cannot take both tables,
    or only slowly.

    Args:
        recipe: what to do.
        tables: of the model.
        destination: what must be able to express them.
        config: Hugging Face config of the model.
    """
    if recipe.scheme == FLOAT or not tables.large:
        return recipe
    if not destination.takes(tables.linears, config):
        return recipe
    chosen = dict.fromkeys(tables.linears, TABLE_SCHEME)
    return recipe.model_copy(update={"overrides": {**chosen, **recipe.overrides}})
