"""Rows of the table: layers with experts, kept as 3-D parameters.

Each row names the modeling file of transformers 5 that it mirrors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from calib.architectures.architecture import Architecture, Refusal
from calib.architectures.pieces import (
    ATTENTION_BIAS,
    EXPERTS,
    LAYER,
    MLP,
    PRE_MLP,
    QK_NORMS,
    QKV_PROJ,
    QKVO_PROJ,
    attention,
    dense_only,
    experts,
    gated_mlp,
)
from calib.architectures.spec import LinearSpec, Space
from calib.architectures.table_pre_norm import LLAMA, QWEN3

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MIXTRAL_EXPERT = (("w1", "w3"), ("w2",))
_QWEN_EXPERT = (("gate_proj", "up_proj"), ("down_proj",))
"""Gate and up, and down, of one expert in checkpoints."""


def _qwen_sparse(config: PreTrainedConfig, layer: int) -> bool:
    """Qwen2MoeDecoderLayer: every ``decoder_sparse_step``-th layer has experts, but for those
    listed.
    """
    return (
        layer not in config.mlp_only_layers
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
    )


# models/mixtral/modeling_mixtral.py
MIXTRAL = replace(
    LLAMA,
    name="Mixtral",
    model_types=("mixtral",),
    linears=attention() + experts(*_MIXTRAL_EXPERT, width="intermediate_size"),
    renames=((r"\.block_sparse_moe\.", ".mlp."),),
    published=((".mlp.", ".block_sparse_moe."),),
    sparse=lambda config, layer: True,
    experts=EXPERTS,
    biases={},
)

# models/qwen3_moe/modeling_qwen3_moe.py
QWEN3_MOE = replace(
    QWEN3,
    name="Qwen3-MoE",
    model_types=("qwen3_moe",),
    linears=attention()
    + experts(*_QWEN_EXPERT, width="moe_intermediate_size")
    + dense_only(gated_mlp()),
    sparse=_qwen_sparse,
    experts=EXPERTS,
)

# models/qwen2_moe/modeling_qwen2_moe.py: as Qwen3-MoE without query and key norms, with a gated
# shared expert.
_SHARED = f"{MLP}.shared_expert"
QWEN2_MOE = replace(
    QWEN3_MOE,
    name="Qwen2-MoE",
    model_types=("qwen2_moe",),
    linears=(
        *QWEN3_MOE.linears,
        LinearSpec(
            f"{_SHARED}.gate_proj", Space.RESIDUAL, Space.FFN, norm=PRE_MLP, layers="sparse"
        ),
        LinearSpec(f"{_SHARED}.up_proj", Space.RESIDUAL, Space.FFN, norm=PRE_MLP, layers="sparse"),
        LinearSpec(
            f"{_SHARED}.down_proj",
            Space.FFN,
            Space.RESIDUAL,
            layers="sparse",
            width="shared_expert_intermediate_size",
            branch="shared",
        ),
        LinearSpec(
            f"{MLP}.shared_expert_gate",
            Space.RESIDUAL,
            norm=PRE_MLP,
            layers="sparse",
            quantizable=False,
        ),
    ),
    untouched=(),
    biases={QKV_PROJ: ("qkv_bias", True)},
)

# models/olmoe/modeling_olmoe.py: norms on queries and keys over all heads.
OLMOE = replace(
    LLAMA,
    name="OLMoE",
    model_types=("olmoe",),
    linears=attention() + experts(*_QWEN_EXPERT, width="intermediate_size"),
    untouched=QK_NORMS,
    refusals=(
        Refusal(
            lambda config: config.clip_qkv is not None,
            "it clips values (clip_qkv), which does not commute with a rotation of them",
        ),
    ),
    sparse=lambda config, layer: True,
    experts=EXPERTS,
    biases=ATTENTION_BIAS,
)

# models/granitemoe/modeling_granitemoe.py: checkpoints hold the experts of a layer in one piece.
_GRANITE_BLOCK = f"{LAYER}.block_sparse_moe"
GRANITEMOE = replace(
    LLAMA,
    name="GraniteMoE",
    model_types=("granitemoe",),
    linears=attention()
    + experts((), (), width="intermediate_size", block=_GRANITE_BLOCK, router="router"),
    renames=(
        (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
    ),
    published=(
        (".experts.gate_up_proj", ".input_linear.weight"),
        (".experts.down_proj", ".output_linear.weight"),
        (".block_sparse_moe.router.", ".block_sparse_moe.router.layer."),
    ),
    sparse=lambda config, layer: True,
    experts=f"{_GRANITE_BLOCK}.experts",
    expert_count=lambda config: int(config.num_local_experts),
    biases=ATTENTION_BIAS,
)

# models/phimoe/modeling_phimoe.py: LayerNorm, a router of two softmaxes, and a head with a bias.
PHIMOE = replace(
    MIXTRAL,
    name="Phi-3.5-MoE",
    model_types=("phimoe",),
    linears=attention() + experts(*_MIXTRAL_EXPERT, width="intermediate_size", router="router"),
    norm_kind="layer",
    renames=((r"\.block_sparse_moe\.", ".mlp."), (r"\.mlp\.gate\.", ".mlp.router.")),
    published=((".mlp.router.", ".mlp.gate."), (".mlp.", ".block_sparse_moe.")),
    expert_count=lambda config: int(config.num_local_experts),
    biases={QKVO_PROJ: ("attention_bias", False), "lm_head": ("lm_head_bias", False)},
)

SPARSE: tuple[Architecture, ...] = (
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GRANITEMOE,
    PHIMOE,
)
