"""A model object that ModelOpt has quantized, as what a run writes: its own amax, nothing
calibrated again and nothing folded, compared with the float model under its quantizers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backends.cpu import cpu_words
from calib.architectures import Wiring
from calib.artifact import Provenance, QuantizedModel
from calib.data.tokens import token_hash
from calib.errors import QuantizationError, RecipeError
from calib.network.skeleton import portable_config
from calib.quantizing.calibrator import kept_reasons
from calib.rotations.rotation_set import RotationSet
from calib.schemes import (
    FLOAT,
    KV_SCHEMES,
    LINEAR_SCHEMES,
    SCHEMES,
    LinearScheme,
    PerBlock,
    Scheme,
    linear_words,
)
from exporter.recipe import Recipe, with_values
from exporter.reporting.describe import package_versions
from exporter.run.artifacts import checked, evaluation_rows
from exporter.run.calibrated import Calibrated
from exporter.run.destination import Destination
from exporter.run.inputs import resolve_device
from exporter.run.options import RunOptions
from exporter.run.stopwatch import Stopwatch
from exporter.source import Source, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from calib.modelopt.taken import Taken

_FIXED = ("scheme", "rotate", "smoothing", "kv", "overrides", "prefix", "weights", "activations")
"""Settings that ModelOpt has settled, or that nothing is left to be done for."""
_KEPT = "left in float by ModelOpt"
_BEYOND = 1.01
"""Of the largest value that is stored: rounding to nearest is within half a step, 0.4 % of int8."""


def quantized_by_modelopt(model: object) -> bool:
    """Whether ``model`` holds quantizers of ModelOpt's; imports nothing."""
    modules = getattr(model, "modules", None)
    return modules is not None and any(
        type(each).__module__.startswith("modelopt.torch.quantization") for each in modules()
    )


def taken_from_modelopt(
    recipe: Recipe,
    options: RunOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    destination: Destination | None,
    clock: Stopwatch,
    *,
    verify: bool,
) -> Calibrated:
    """What ``mtq.quantize`` made of ``model``.

    Args:
        recipe: how it is written; settings that would change what was calibrated are refused.
        options: of the run.
        model: a Hugging Face causal LM with ModelOpt's quantizers.
        tokenizer: its tokenizer.
        destination: what must be able to express it, if anything.
        clock: times the stages.
        verify: whether it is to be compared with its float model.

    Raises:
        RecipeError: a setting that has nothing to act on.
        QuantizationError: a quantizer that rotq has nothing for.
        BackendError: a target cannot express what was calibrated.
    """
    _refuse_settings(recipe, options)
    from calib.modelopt.taken import take

    with clock.stage("read"):
        taken = take(model)
        source = open_source(recipe, taken.model, tokenizer)
        fused = source.fuse(RotationSet(), dtype=torch.float32, fold_norms=False)
        scheme, settled = _settled(taken, source.wiring, fused.state)
        recipe = with_values(recipe, settled)
        replaced = {f"{name}.{part}" for name in taken.linears for part in ("weight", "bias")}
        names = source.wiring.quantizable
        kept = {name: _KEPT for name in names if name not in taken.linears}
        quantized = QuantizedModel(
            config=portable_config(fused.config),
            scheme=scheme,
            dtype=torch.float32,
            linears=taken.linears,
            floats={name: each for name, each in fused.state.items() if name not in replaced},
            kept={**kept_reasons(fused, taken.linears), **kept},
            rotations=RotationSet(),
            provenance=_provenance(recipe, source),
            files=dict(source.files),
            cache=taken.cache,
            norms_folded=False,
        )
    return Calibrated(
        recipe,
        checked(quantized, recipe, destination),
        resolve_device(recipe.device),
        source,
        fused,
        evaluation_rows(recipe, quantized, clock) if verify else None,
    )


def _refuse_settings(recipe: Recipe, options: RunOptions) -> None:
    """Refuse what would have to be done before ModelOpt, or has nothing to act on."""
    for key in _FIXED:
        if key in recipe.model_fields_set and getattr(recipe, key) != getattr(Recipe(), key):
            raise RecipeError(
                f"'{key}' has no effect: ModelOpt has quantized the model already",
                hint="leave it out, or give the float model",
            )
    for name in ("from_artifact", "from_capture", "work_dir"):
        if getattr(options, name) is not None:
            raise RecipeError(
                f"{name} has no effect on a model that ModelOpt has quantized",
                hint="leave it out, or give the float model",
            )


def _settled(
    taken: Taken, wiring: Wiring, floats: Mapping[str, Tensor]
) -> tuple[Scheme, dict[str, Any]]:
    """What ModelOpt has done, as a scheme and the settings that would ask rotq for the same."""
    outside = [*(table.name for table in wiring.embeddings), wiring.head.name]
    schemes = {
        name: LinearScheme(each.weight_scheme, each.input_scheme)
        for name, each in taken.linears.items()
    }
    unknown = [name for name in schemes if name not in wiring.quantizable and name not in outside]
    if unknown:
        raise QuantizationError(
            f"ModelOpt has quantized '{unknown[0]}', which is no linear that rotq quantizes",
            hint="turn its quantizers off in the configuration",
        )
    counted = Counter(schemes[name] for name in schemes if name not in outside)
    main = (counted or Counter(schemes.values())).most_common(1)[0][0]
    preset = _preset(main)
    settings: dict[str, Any] = {
        "scheme": preset.name,
        "rotate": "none",
        "smoothing": "none",
        "prefix": "none",
        "widen": "none",
        "kv": _cache_format(taken),
        "weights.algorithm": "mse" if _clips(taken, floats) else "rtn",
        "overrides": {
            name: _override(name, schemes.get(name))
            for name in [*wiring.quantizable, *outside]
            if schemes.get(name) != (None if name in outside else main)
        },
    }
    if isinstance(main.weight.granularity, PerBlock):
        settings["weights.block_size"] = main.weight.granularity.size
    return replace(preset, weight=main.weight, activation=main.input), settings


def _preset(scheme: LinearScheme) -> Scheme:
    """The scheme that is this one but for the size of its blocks."""

    def blocks(of: LinearScheme) -> LinearScheme:
        sized = isinstance(of.weight.granularity, PerBlock)
        return replace(of, weight=replace(of.weight, granularity=PerBlock(1))) if sized else of

    for preset in SCHEMES.values():
        if preset.linear is not None and blocks(preset.linear) == blocks(scheme):
            return preset
    raise QuantizationError(
        f"rotq has no scheme for what ModelOpt has made of most linears: {linear_words(scheme)}",
        hint=f"rotq's schemes are: {', '.join(SCHEMES)}",
    )


def _override(name: str, scheme: LinearScheme | None) -> str:
    if scheme is None:
        return FLOAT
    for preset, linear in LINEAR_SCHEMES.items():
        if linear == scheme:
            return preset
    raise QuantizationError(
        f"rotq has no scheme for what ModelOpt has made of '{name}': {linear_words(scheme)}",
        hint=f"rotq's schemes are: {', '.join(SCHEMES)}",
    )


def _clips(taken: Taken, floats: Mapping[str, Tensor]) -> bool:
    """Whether a weight is beyond its scale, as where amax was searched (mse) and not measured."""
    return any(
        bool((floats[f"{name}.weight"].abs().amax() > each.values().abs().amax() * _BEYOND).any())
        for name, each in taken.linears.items()
    )


def _cache_format(taken: Taken) -> str | None:
    if taken.cache is None:
        return None
    return next(name for name, each in KV_SCHEMES.items() if each == taken.cache.scheme)


def _provenance(recipe: Recipe, source: Source) -> Provenance:
    """Of a model that this run has calibrated nothing of."""
    return Provenance(
        source=source.name,
        fingerprint=source.fingerprint,
        recipe=recipe.model_dump(mode="json"),
        parameters=source.parameters(),
        nbytes=source.nbytes(),
        calibration_rows=0,
        calibration_tokens=0,
        calibration_sha256=token_hash([]),
        versions=package_versions(),
        cpu=cpu_words(),
        threads=torch.get_num_threads(),
    )
