"""What a recipe says of capture and quantization, as the settings that :mod:`calib` takes.

Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from calib.capture.sites import CaptureConfig
from calib.errors import QuantizationError, RecipeError
from calib.quantizing.plan import Quantization, customised, resolve
from calib.schemes import FLOAT, SCHEMES, Scheme, scheme_named
from calib.smoothing.methods import smoothing_named
from calib.weights.algorithms import algorithm_named
from exporter.recipe import Activations, Recipe, Weights

if TYPE_CHECKING:
    from calib.architectures import Wiring

logger = logging.getLogger(__name__)

QUICK_TOKENS = 8192
"""Of calibration for each candidate that is only compared: limits settle long before."""
GATE_TOKENS = 4096
"""On which candidates are compared, at most."""
GATE_ROW_TOKENS = 512
"""Of one row, at most: the noise of a comparison shows between rows, and eight are few enough."""


def customised_scheme(recipe: Recipe) -> Scheme:
    """The recipe's scheme with its finer controls; the same object for the same recipe.

    Raises:
        QuantizationError: there is no such scheme, or it does not have a control.
    """
    return _customised(recipe.scheme, recipe.weights, recipe.activations)


@lru_cache(maxsize=8)
def _customised(name: str, weights: Weights, activations: Activations) -> Scheme:
    # Cached, because the command line asks before torch is imported, and the run after it.
    return customised(
        scheme_named(name),
        block_size=weights.block_size,
        weight_symmetric=weights.symmetric,
        activation_symmetric=activations.symmetric,
        activation_granularity=activations.granularity,
    )


def quantization_of(recipe: Recipe, scheme: Scheme, wiring: Wiring) -> Quantization:
    """What the recipe does to every linear of one model.

    Args:
        recipe: overrides, observer, weight algorithm and cache.
        scheme: the recipe's, of :func:`customised_scheme`.
        wiring: that of the model.

    Raises:
        QuantizationError: as :func:`calib.quantizing.plan.resolve`.
    """
    return resolve(
        scheme,
        wiring,
        overrides=recipe.overrides,
        observer=recipe.activations.observer,
        weights=recipe.weights.algorithm,
        kv=recipe.kv,
    )


def folds_norms(recipe: Recipe, quantization: Quantization) -> bool:
    """Whether the norms of a model are folded into what reads them where no R1 needs it.

    A gain of ``g`` is a scale between a weight's column and its input. Folded, it stretches the
    weight's columns, which rounded to few bits then lose more; the input loses it, which is
    smoother as a rule.

    Args:
        recipe: its ``rotation.fold_norms`` decides, unless ``auto``.
        quantization: of the model; ``auto`` folds where it quantizes any input.
    """
    wanted = recipe.rotation.fold_norms
    if wanted != "auto":
        return wanted
    return any(linear.input is not None for linear in quantization.linears.values())


def captured_tokens(recipe: Recipe) -> int:
    """How many calibration tokens are run to capture statistics, at most: twice what the reservoir
    of R1 has places for, and never fewer than by default. Each token passes several sites, so
    that more would hardly change what is kept.
    """
    settings = recipe.rotation
    return 2 * max(settings.r1_tokens, type(settings)().r1_tokens)


def capture_config(recipe: Recipe) -> CaptureConfig:
    """How much of the activations a recipe keeps."""
    settings = recipe.rotation
    return CaptureConfig(
        settings.r1_tokens, settings.r2_tokens, settings.massive_fraction, seed=recipe.seed
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
    _check_moot(recipe)
    if recipe.activations.observer != "min_max":
        from calib.observers.registry import observer_named  # needs torch

        _checked("activations.observer", lambda: observer_named(recipe.activations.observer))
    check_layerwise(recipe)
    if recipe.rotation.fold_norms is False and "r1" in recipe.rotate.certain:
        raise RecipeError(
            "recipe key 'rotation.fold_norms' cannot be false with R1, which passes norms only once"
            " their gains are folded",
            hint="leave r1 out of --rotate, or set rotation.fold_norms to auto",
        )
    for pattern, name in recipe.overrides.items():
        _checked(f"overrides.{pattern}", partial(scheme_named, name))


def _check_moot(recipe: Recipe) -> None:
    """Refuse what a scheme, its overrides and the cache leave nothing to do for."""
    schemes = [
        customised_scheme(recipe),
        *(scheme_named(name) for name in recipe.overrides.values() if name in SCHEMES),
    ]
    weights = [each for each in schemes if each.weight is not None]
    inputs = [each for each in weights if each.activation and each.activation.needs_calibration]
    moot = {
        "weights.algorithm": recipe.weights.algorithm != "rtn" and not weights,
        "activations.observer": (
            recipe.activations.observer != "min_max" and not inputs and recipe.kv is None
        ),
    }
    for key, has_no_effect in moot.items():
        if has_no_effect:
            raise RecipeError(
                f"recipe key '{key}' has no effect on what the scheme '{recipe.scheme}' does",
                hint="leave it out, or choose another scheme",
            )


def check_layerwise(recipe: Recipe) -> None:
    """Refuse what layer-wise mode cannot do, before anything is read.

    Raises:
        RecipeError: with the key and the reason.
    """
    settings = recipe.layerwise
    if not settings.enabled:
        if settings.asym:
            raise RecipeError(
                "recipe key 'layerwise.asym' has no effect",
                hint="add --layerwise, or leave --asym out",
            )
        return
    if recipe.rotate.auto:
        raise RecipeError(
            "layer-wise mode cannot compare sets of rotations, which takes the whole model",
            hint=(
                "name them: --rotate none, or --rotate r1,r2,r4, trained or those of --rotations"
            ),
        )
    if recipe.certain_prefix and recipe.smoothing != "none":
        raise RecipeError(
            "layer-wise mode cannot smooth behind a prefix, whose values would have to be scaled"
            " with every block",
            hint="leave --prefix, --smoothing or --layerwise out",
        )


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
