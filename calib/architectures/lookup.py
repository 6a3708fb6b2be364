"""From a transformers config to its :class:`Architecture`, or to the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from calib.architectures.architecture import Architecture
from calib.architectures.table import ARCHITECTURES
from calib.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_BY_MODEL_TYPE = {model_type: entry for entry in ARCHITECTURES for model_type in entry.model_types}

FLOAT_CHECKPOINT = "start from the floating-point checkpoint that it was made from"
"""What to do about weights that are quantized already."""


def supported_model_types() -> list[str]:
    """Every ``model_type`` that :func:`architecture_for` accepts, sorted."""
    return sorted(_BY_MODEL_TYPE)


def architecture_named(model_type: str) -> Architecture:
    """The table entry for a ``model_type`` alone, where no config says what of it can be folded.

    Raises:
        UnsupportedModelError: it is not in the table.
    """
    if model_type not in _BY_MODEL_TYPE:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not in the architecture table, which has:"
            f" {', '.join(supported_model_types())}",
            hint="start from a model of one of these families",
        )
    return _BY_MODEL_TYPE[model_type]


def refuse_config(config: Mapping[str, Any]) -> None:
    """Refuse a model that is quantized already, or that is no causal LM.

    Args:
        config: the content of config.json.

    Raises:
        UnsupportedModelError: with the reason.
    """
    model_type = config.get("model_type")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedModelError(
            f"this {model_type} checkpoint is quantized already (its config has a"
            f" quantization_config{f': {method}' if method else ''})",
            hint=FLOAT_CHECKPOINT,
        )
    for key in ("dtype", "torch_dtype"):
        if not isinstance(config.get(key), str | None):  # transformers believes it, and stumbles
            raise UnsupportedModelError(
                f"the config says '{key}' is {config[key]!r:.40}, which is no dtype",
                hint='mend config.json: "dtype": "bfloat16", for example',
            )
    names = config.get("architectures") or []
    names = list(names) if isinstance(names, list | tuple) else [names]
    # ...LMHeadModel is GPT-2's, ...Model a bare decoder
    if names and not any(str(name).endswith(("ForCausalLM", "Model")) for name in names):
        raise UnsupportedModelError(
            f"this {model_type} model is no causal LM: its config says"
            f" {', '.join(map(str, names))}, whose head rotq would drop",
            hint="use a model whose config.json names a ...ForCausalLM under architectures",
        )


def architecture_for(config: PreTrainedConfig) -> Architecture:
    """The table entry for a transformers config, or, of a family that is not in the table, what its
    module tree says (:mod:`calib.architectures.generic`), which folds nothing: a wrong mapping
    damages a model silently.

    Args:
        config: a ``PreTrainedConfig``.

    Raises:
        UnsupportedModelError: the model runs its own code, is quantized already, is no decoder that
            keeps keys and values, or has a feature that cannot be folded.
        CheckpointError: the family is not in the table, and transformers cannot build the model.
    """
    model_type = getattr(config, "model_type", None) or "unknown"
    if not type(config).__module__.startswith("transformers."):
        raise UnsupportedModelError(
            f"model_type {model_type!r} is loaded with code of its own ({type(config).__module__}),"
            " which may be wired differently from transformers",
            hint=(
                "load it without --trust-remote-code, where transformers has a class of that type;"
                " rotq reads no wiring out of other code, trusted or not"
            ),
        )
    keys = ("model_type", "architectures", "quantization_config")
    refuse_config({key: getattr(config, key, None) for key in keys})

    if model_type not in _BY_MODEL_TYPE:
        from calib.architectures.generic import generic_architecture  # needs torch

        return generic_architecture(config)
    entry = architecture_named(model_type)
    for refusal in entry.refusals:
        if refusal.when(config):
            raise UnsupportedModelError(
                f"this {model_type} model cannot be folded: {refusal.reason}",
                hint=(
                    "use a model without that feature; supported families are:"
                    f" {', '.join(supported_model_types())}"
                ),
            )
    return entry
