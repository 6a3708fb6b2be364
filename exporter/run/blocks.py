"""How many weights share a scale, where a recipe leaves that open: fewer than the scheme says,
where every target runs that. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from calib.schemes import LinearScheme
from exporter.recipe import CAREFUL_SCHEMES, Recipe
from exporter.run.destination import Destination

NARROW = 1024
"""Hidden size below which blocks are the smallest."""
BLOCKS = {True: 32, False: 64}
"""Input features of a block, of a narrow model and of others. By GPTQ SmolLM2-135M (hidden size
576) has 1.15 times its perplexity in blocks of 128, 1.09 in blocks of 64 and 1.05 in blocks of 32.
A scale in float32 for every 32 weights makes 5 bits of their 4."""


def with_blocks(
    recipe: Recipe,
    hidden: int,
    linears_of: Callable[[Recipe], Mapping[str, LinearScheme]],
    destination: Destination,
    config: Mapping[str, Any],
) -> Recipe:
    """``recipe`` with smaller blocks, where it says nothing of them and its scheme is one of few
    bits that is rounded with care.

    Args:
        recipe: what to do.
        hidden: width of the model.
        linears_of: what a recipe makes of each of its linears.
        destination: what must run them, without falling back to something slow.
        config: Hugging Face config of the model.
    """
    weights = recipe.weights
    if recipe.scheme not in CAREFUL_SCHEMES or weights.block_size is not None:
        return recipe
    smaller = weights.model_copy(update={"block_size": BLOCKS[hidden < NARROW]})
    changed = recipe.model_copy(update={"weights": smaller})
    return changed if destination.takes(linears_of(changed), config) else recipe
