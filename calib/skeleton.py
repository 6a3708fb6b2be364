"""A Hugging Face model built from a config and some of its weights, the rest never allocated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import CheckpointError
from calib.modules import set_submodule

_MIXED = "the folder mixes files of two models, or was edited after it was written"


def portable_config(config: Any) -> dict[str, Any]:
    """A Hugging Face config as a dictionary that says nothing of the machine it was loaded on."""
    values: dict[str, Any] = config.to_dict()
    values.pop("_name_or_path", None)
    return values


def build_skeleton(config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, skip: Collection[str]) -> nn.Module:
    """The causal LM of ``config`` in eval mode, holding ``tensors``, ``Identity`` where ``skip`` names a module.

    The constructor runs without initialising weights, so what it allocates is never touched and costs no memory;
    buffers that a constructor computes (rotary frequencies) are real.

    Args:
        config: a Hugging Face config as a dictionary, with ``model_type``.
        tensors: parameters by checkpoint key, used without a copy.
        skip: dotted names of modules that the caller puts something else in place of.

    Raises:
        CheckpointError: a parameter outside ``skip`` is missing or has another shape, or ``tensors`` holds one that the
            model has not.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    values = {key: value for key, value in config.items() if key != "model_type"}
    with no_init_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **values), attn_implementation="sdpa"
        )
    for name in skip:
        set_submodule(model, name, nn.Identity())
    _take_head_bias(model, tensors)
    try:
        result = model.load_state_dict(dict(tensors), strict=False, assign=True)
    except RuntimeError as error:  # a tensor of another shape
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the weights do not fit the config: {reason}", hint=_MIXED) from error
    if result.missing_keys or result.unexpected_keys:
        raise CheckpointError(
            f"the weights do not fit the config: missing {result.missing_keys[:4]}, "
            f"unexpected {result.unexpected_keys[:4]}",
            hint=_MIXED,
        )
    return model.eval().requires_grad_(False)


def _take_head_bias(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give the output head a bias where the weights hold one: it had to take that of its norm (:mod:`calib.fusing`)."""
    head = model.get_output_embeddings()
    key = next((f"{name}.bias" for name, module in model.named_modules() if module is head), "")
    if key in tensors and getattr(head, "bias", None) is None:
        head.bias = nn.Parameter(torch.empty_like(tensors[key], device="meta"), requires_grad=False)
