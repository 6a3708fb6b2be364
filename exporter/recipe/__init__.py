"""The recipe: what it holds, how far each setting reaches, and how it is read."""

from __future__ import annotations

from exporter.recipe.loading import load_recipe, presets, recipe_of_artifact, with_values
from exporter.recipe.schema import (
    CAREFUL_SCHEMES,
    EMBEDDED,
    RECIPE_FILE,
    Activations,
    Recipe,
    Training,
    Weights,
    parse_size,
)
from exporter.recipe.scope import Scope

__all__ = [
    "CAREFUL_SCHEMES",
    "EMBEDDED",
    "RECIPE_FILE",
    "Activations",
    "Recipe",
    "Scope",
    "Training",
    "Weights",
    "load_recipe",
    "parse_size",
    "presets",
    "recipe_of_artifact",
    "with_values",
]
