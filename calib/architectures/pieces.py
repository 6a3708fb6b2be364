"""What rows of the table have in common: names of modules, and the linears of attention, MLP and
experts that most families are made of.
"""

from __future__ import annotations

from dataclasses import replace

from calib.architectures.spec import LinearSpec, Part, Space

LAYER = "model.layers.{i}"
ATTENTION = f"{LAYER}.self_attn"
MLP = f"{LAYER}.mlp"
EXPERTS = f"{MLP}.experts"
PRE_ATTENTION = f"{LAYER}.input_layernorm"
PRE_MLP = f"{LAYER}.post_attention_layernorm"
QK_NORM_MODULES = (f"{ATTENTION}.q_norm", f"{ATTENTION}.k_norm")
QK_NORMS = tuple(f"{norm}.weight" for norm in QK_NORM_MODULES)
QKV = (Part("query", Space.QUERY_KEY), Part("key", Space.QUERY_KEY), Part("value", Space.VALUE))
GATE_UP = (Part("gate", Space.FFN), Part("up", Space.FFN))

QKV_PROJ, QKVO_PROJ, MLP_PROJ = "[qkv]_proj", "[qkvo]_proj", "(gate|up|down)_proj"
"""Last names of linears, as patterns of :attr:`~calib.architectures.Architecture.biases`."""
ALWAYS = ("", True)
"""A bias that no key of the config takes away."""
ATTENTION_BIAS = {QKVO_PROJ: ("attention_bias", False)}

POST_NORM = (
    "it normalises the outputs of attention and MLP before adding them to the residual stream, and"
    " the gain of such a norm (one factor per channel) does not commute with a rotation of the"
    " channels"
)


def attention(norm: str | None = PRE_ATTENTION, output: str = "o_proj") -> tuple[LinearSpec, ...]:
    """Query, key, value and the output projection, which most call ``o_proj``."""
    query, out = f"{ATTENTION}.q_proj", f"{ATTENTION}.{output}"
    return (
        LinearSpec(query, Space.RESIDUAL, Space.QUERY_KEY, norm=norm, captured_at=query),
        LinearSpec(f"{ATTENTION}.k_proj", Space.RESIDUAL, Space.QUERY_KEY, norm=norm),
        LinearSpec(f"{ATTENTION}.v_proj", Space.RESIDUAL, Space.VALUE, norm=norm),
        LinearSpec(out, Space.VALUE, Space.RESIDUAL, captured_at=out),
    )


def gated_mlp(norm: str | None = PRE_MLP) -> tuple[LinearSpec, ...]:
    """``down(act(gate(x)) * up(x))``."""
    return (LinearSpec(f"{MLP}.gate_proj", Space.RESIDUAL, Space.FFN, norm=norm), *plain_mlp(norm))


def plain_mlp(
    norm: str | None = PRE_MLP, up: str = "up_proj", down: str = "down_proj"
) -> tuple[LinearSpec, ...]:
    """``down(act(up(x)))``."""
    first = f"{MLP}.{up}"
    return (
        LinearSpec(first, Space.RESIDUAL, Space.FFN, norm=norm, captured_at=first),
        LinearSpec(f"{MLP}.{down}", Space.FFN, Space.RESIDUAL),
    )


def packed_mlp(norm: str) -> tuple[LinearSpec, ...]:
    """A gated MLP with gate and up in one linear."""
    both = f"{MLP}.gate_up_proj"
    return (
        LinearSpec(both, Space.RESIDUAL, norm=norm, parts=GATE_UP, captured_at=both),
        LinearSpec(f"{MLP}.down_proj", Space.FFN, Space.RESIDUAL),
    )


def experts(
    gate_up: tuple[str, ...],
    down: tuple[str, ...],
    width: str,
    block: str = MLP,
    router: str = "gate",
) -> tuple[LinearSpec, ...]:
    """Router and experts of a sparse layer.

    Args:
        gate_up: tensors of one expert in checkpoints whose rows follow each other in the 3-D
            parameter of gate and up; none where checkpoints hold that parameter.
        down: the same for the down projection.
        width: config attribute with the width of one expert.
        block: module that holds router and experts, and whose input both read.
        router: what the router is called in it.
    """
    held = f"{block}.experts"
    return (
        LinearSpec(
            f"{block}.{router}",
            Space.RESIDUAL,
            norm=PRE_MLP,
            layers="sparse",
            quantizable=False,
            captured_at=block,
        ),
        LinearSpec(
            f"{held}.gate_up_proj",
            Space.RESIDUAL,
            norm=PRE_MLP,
            layout="experts",
            parts=GATE_UP,
            layers="sparse",
            stacked_from=tuple(f"{held}.{{e}}.{name}.weight" for name in gate_up),
        ),
        LinearSpec(
            f"{held}.down_proj",
            Space.FFN,
            Space.RESIDUAL,
            layout="experts",
            layers="sparse",
            width=width,
            stacked_from=tuple(f"{held}.{{e}}.{name}.weight" for name in down),
        ),
    )


def dense_only(specs: tuple[LinearSpec, ...]) -> tuple[LinearSpec, ...]:
    """The same linears, in layers without experts alone."""
    return tuple(replace(spec, layers="dense") for spec in specs)
