"""What a recipe says of quantization, as the settings that :mod:`calib` takes. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from calib.architectures import Wiring
from calib.errors import QuantizationError, RecipeError
from calib.quantizing.plan import Quantization, customised, resolve
from calib.schemes import FLOAT, Scheme, scheme_named
from calib.smoothing.methods import smoothing_named
from calib.weights.algorithms import algorithm_named
from exporter.recipe import Recipe
from exporter.run.layerwise import check_layerwise

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


def customised_scheme(recipe: Recipe) -> Scheme:
    """The recipe's scheme with its finer controls.

    Raises:
        QuantizationError: there is no such scheme, or it does not have a control.
    """
    return customised(
        scheme_named(recipe.scheme),
        block_size=recipe.weights.block_size,
        weight_symmetric=recipe.weights.symmetric,
        activation_symmetric=recipe.activations.symmetric,
        activation_granularity=recipe.activations.granularity,
    )


def quantization_of(recipe: Recipe, wiring: Wiring) -> Quantization:
    """What the recipe does to every linear of one model.

    Raises:
        QuantizationError: as :func:`calib.quantizing.plan.resolve`.
    """
    return resolve(
        customised_scheme(recipe),
        wiring,
        overrides=recipe.overrides,
        observer=recipe.activations.observer,
        weights=recipe.weights.algorithm,
        kv=recipe.kv,
    )


def check_names(recipe: Recipe) -> None:
    """Refuse names and settings that do not exist, before anything heavy is imported.

    Raises:
        RecipeError: naming the key.
    """
    _checked("scheme", lambda: scheme_named(recipe.scheme))
    _checked("weights", lambda: customised_scheme(recipe))
    _checked("weights.algorithm", lambda: algorithm_named(recipe.weights.algorithm))
    _checked("smoothing", lambda: smoothing_named(recipe.smoothing))
    if recipe.smoothing != "none" and recipe.scheme == FLOAT and not recipe.overrides:
        raise RecipeError(
            "recipe key 'smoothing' has no effect: the scheme 'float' quantizes nothing"
        )
    if recipe.activations.observer != "min_max":
        from calib.observers.registry import observer_named  # needs torch

        _checked("activations.observer", lambda: observer_named(recipe.activations.observer))
    check_layerwise(recipe)
    for pattern, name in recipe.overrides.items():
        _checked(f"overrides.{pattern}", partial(scheme_named, name))


def warn_of_slow_choices(recipe: Recipe) -> None:
    """Log what no runtime runs fast, before the long job."""
    if (recipe.activations.granularity or "").startswith("cluster"):
        from calib.stats.clusters import NO_FUSED_KERNEL  # needs torch

        logger.warning(NO_FUSED_KERNEL)


def _checked(key: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except QuantizationError as error:
        raise RecipeError(f"recipe key '{key}': {error.message}", hint=error.hint) from error
