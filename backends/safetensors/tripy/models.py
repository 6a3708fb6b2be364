"""The model families that there are Tripy modules for, and what these cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from backends.base import Reason
from calib.architectures.architecture import Refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
"""Activations of the MLP, as transformers names them."""
_VARYING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Family:
    """Models that one module runs."""

    name: str
    model_types: tuple[str, ...]
    refusals: tuple[Refusal, ...]


LLAMA = Family(
    "Llama",
    ("llama", "mistral", "qwen2"),
    (
        Refusal(
            lambda config: config.hidden_act not in ACTIVATIONS,
            "its activation has no Tripy function here",
        ),
        Refusal(
            lambda config: (
                (config.rope_parameters or {}).get("rope_type", "default") in _VARYING_ROPE
            ),
            "its rotary frequencies change with the length of the sequence",
        ),
    ),
)
GPT2 = Family(
    "GPT",
    ("gpt2",),
    (
        Refusal(
            lambda config: config.activation_function not in ACTIVATIONS,
            "its activation has no Tripy function here",
        ),
        Refusal(
            lambda config: config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights,
            "it scales attention scores in its own way",
        ),
        Refusal(lambda config: config.add_cross_attention, "it attends to an encoder"),
    ),
)
FAMILIES = (LLAMA, GPT2)


def family_of(model_type: str) -> Family | None:
    """The family that ``model_type`` belongs to, if there is a module for it."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def refusal_of(config: PretrainedConfig) -> Reason | None:
    """Why the modules cannot run the model of a transformers ``config``, and what to do; ``None``
    if they can.
    """
    family = family_of(config.model_type)
    known = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    hint = f"there are modules for {known}; `--target tensorrt` writes any dense model"
    if family is None:
        return Reason(f"there is no Tripy module for {config.model_type} models", hint)
    reason = next((refusal.reason for refusal in family.refusals if refusal.when(config)), None)
    if reason is None:
        return None
    return Reason(f"the Tripy module cannot run this model: {reason}", hint)
