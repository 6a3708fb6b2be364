"""The table. An entry is checked by the equivalence tests: logits before and after fusing agree in
float64.

Names are those of the module tree in transformers 5; each entry names the modeling file that it
mirrors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from calib.architectures.architecture import Architecture, Refusal
from calib.architectures.spec import EmbeddingSpec, LinearSpec, NormSpec, Part, Space

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LAYER = "model.layers.{i}"
_ATTENTION = f"{_LAYER}.self_attn"
_MLP = f"{_LAYER}.mlp"
_EXPERTS = f"{_MLP}.experts"
_PRE_ATTENTION = f"{_LAYER}.input_layernorm"
_PRE_MLP = f"{_LAYER}.post_attention_layernorm"
_QK_NORMS = (f"{_ATTENTION}.q_norm.weight", f"{_ATTENTION}.k_norm.weight")
_QKV = (Part("query", Space.QUERY_KEY), Part("key", Space.QUERY_KEY), Part("value", Space.VALUE))
_GATE_UP = (Part("gate", Space.FFN), Part("up", Space.FFN))


def _attention(norm: str | None = _PRE_ATTENTION) -> tuple[LinearSpec, ...]:
    query, output = f"{_ATTENTION}.q_proj", f"{_ATTENTION}.o_proj"
    return (
        LinearSpec(query, Space.RESIDUAL, Space.QUERY_KEY, norm=norm, captured_at=query),
        LinearSpec(f"{_ATTENTION}.k_proj", Space.RESIDUAL, Space.QUERY_KEY, norm=norm),
        LinearSpec(f"{_ATTENTION}.v_proj", Space.RESIDUAL, Space.VALUE, norm=norm),
        LinearSpec(output, Space.VALUE, Space.RESIDUAL, captured_at=output),
    )


def _gated_mlp(norm: str | None = _PRE_MLP) -> tuple[LinearSpec, ...]:
    up = f"{_MLP}.up_proj"
    return (
        LinearSpec(f"{_MLP}.gate_proj", Space.RESIDUAL, Space.FFN, norm=norm),
        LinearSpec(up, Space.RESIDUAL, Space.FFN, norm=norm, captured_at=up),
        LinearSpec(f"{_MLP}.down_proj", Space.FFN, Space.RESIDUAL),
    )


def _experts(stored: str, gate: str, up: str, down: str, width: str) -> tuple[LinearSpec, ...]:
    """Router and experts of a sparse layer. ``stored`` is the expert's prefix in checkpoints, one
    tensor per expert.
    """
    return (
        LinearSpec(
            f"{_MLP}.gate",
            Space.RESIDUAL,
            norm=_PRE_MLP,
            layers="sparse",
            quantizable=False,
            captured_at=_MLP,
        ),
        LinearSpec(
            f"{_EXPERTS}.gate_up_proj",
            Space.RESIDUAL,
            norm=_PRE_MLP,
            layout="experts",
            parts=_GATE_UP,
            layers="sparse",
            stacked_from=(f"{stored}.{gate}.weight", f"{stored}.{up}.weight"),
        ),
        LinearSpec(
            f"{_EXPERTS}.down_proj",
            Space.FFN,
            Space.RESIDUAL,
            layout="experts",
            layers="sparse",
            width=width,
            stacked_from=(f"{stored}.{down}.weight",),
        ),
    )


def _dense_only(specs: tuple[LinearSpec, ...]) -> tuple[LinearSpec, ...]:
    return tuple(replace(spec, layers="dense") for spec in specs)


def _qwen_sparse(config: PreTrainedConfig, layer: int) -> bool:
    """Qwen2MoeDecoderLayer: every ``decoder_sparse_step``-th layer has experts, but for those
    listed.
    """
    return (
        layer not in config.mlp_only_layers
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
    )


# models/llama/modeling_llama.py; Mistral, Qwen2 (query, key and value biases) and Granite (scalar
# multipliers on embeddings, residuals and logits, which commute with rotations) have the same
# module tree.
LLAMA = Architecture(
    name="Llama",
    model_types=("llama", "mistral", "qwen2", "granite"),
    linears=_attention() + _gated_mlp(),
    norms=(NormSpec(_PRE_ATTENTION), NormSpec(_PRE_MLP)),
    final_norm=NormSpec("model.norm"),
    embeddings=(EmbeddingSpec("model.embed_tokens"),),
    head=LinearSpec("lm_head", Space.RESIDUAL, norm="model.norm", quantizable=False),
    attention=_ATTENTION,
)

# models/qwen3/modeling_qwen3.py: norms on queries and keys per head, before RoPE.
QWEN3 = replace(LLAMA, name="Qwen3", model_types=("qwen3",), untouched=_QK_NORMS)

# models/smollm3/modeling_smollm3.py: no_rope_layers holds 1 for a layer that does use RoPE.
SMOLLM3 = replace(
    LLAMA,
    name="SmolLM3",
    model_types=("smollm3",),
    rope=lambda config, layer: bool(config.no_rope_layers[layer]),
)

# models/gemma/modeling_gemma.py: the norm multiplies by 1 + gain; embeddings are scaled by a
# scalar.
GEMMA = replace(LLAMA, name="Gemma", model_types=("gemma",), gain_offset=1.0)

# models/phi3/modeling_phi3.py: query, key and value in one linear, gate and up in another.
PHI3 = replace(
    LLAMA,
    name="Phi-3",
    model_types=("phi3",),
    linears=(
        LinearSpec(
            f"{_ATTENTION}.qkv_proj",
            Space.RESIDUAL,
            norm=_PRE_ATTENTION,
            parts=_QKV,
            captured_at=f"{_ATTENTION}.qkv_proj",
        ),
        LinearSpec(
            f"{_ATTENTION}.o_proj", Space.VALUE, Space.RESIDUAL, captured_at=f"{_ATTENTION}.o_proj"
        ),
        LinearSpec(
            f"{_MLP}.gate_up_proj",
            Space.RESIDUAL,
            norm=_PRE_MLP,
            parts=_GATE_UP,
            captured_at=f"{_MLP}.gate_up_proj",
        ),
        LinearSpec(f"{_MLP}.down_proj", Space.FFN, Space.RESIDUAL),
    ),
)

# models/mixtral/modeling_mixtral.py
MIXTRAL = replace(
    LLAMA,
    name="Mixtral",
    model_types=("mixtral",),
    linears=_attention() + _experts(f"{_EXPERTS}.{{e}}", "w1", "w3", "w2", "intermediate_size"),
    renames=((r"\.block_sparse_moe\.", ".mlp."),),
    sparse=lambda config, layer: True,
    experts=_EXPERTS,
)

# models/qwen3_moe/modeling_qwen3_moe.py
QWEN3_MOE = replace(
    QWEN3,
    name="Qwen3-MoE",
    model_types=("qwen3_moe",),
    linears=_attention()
    + _experts(f"{_EXPERTS}.{{e}}", "gate_proj", "up_proj", "down_proj", "moe_intermediate_size")
    + _dense_only(_gated_mlp()),
    sparse=_qwen_sparse,
    experts=_EXPERTS,
)

# models/qwen2_moe/modeling_qwen2_moe.py: as Qwen3-MoE without query and key norms, with a gated
# shared expert.
_SHARED = f"{_MLP}.shared_expert"
QWEN2_MOE = replace(
    QWEN3_MOE,
    name="Qwen2-MoE",
    model_types=("qwen2_moe",),
    linears=(
        *QWEN3_MOE.linears,
        LinearSpec(
            f"{_SHARED}.gate_proj", Space.RESIDUAL, Space.FFN, norm=_PRE_MLP, layers="sparse"
        ),
        LinearSpec(f"{_SHARED}.up_proj", Space.RESIDUAL, Space.FFN, norm=_PRE_MLP, layers="sparse"),
        LinearSpec(
            f"{_SHARED}.down_proj",
            Space.FFN,
            Space.RESIDUAL,
            layers="sparse",
            width="shared_expert_intermediate_size",
            branch="shared",
        ),
        LinearSpec(
            f"{_MLP}.shared_expert_gate",
            Space.RESIDUAL,
            norm=_PRE_MLP,
            layers="sparse",
            quantizable=False,
        ),
    ),
    untouched=(),
)

_POST_NORM = (
    "it normalises the outputs of attention and MLP before adding them to the residual stream, and"
    " the gain of such a norm (one factor per channel) does not commute with a rotation of the"
    " channels"
)

# models/gemma2/modeling_gemma2.py: norms before and after both attention and MLP.
_GEMMA2_POST = (
    f"{_LAYER}.post_attention_layernorm.weight",
    f"{_LAYER}.post_feedforward_layernorm.weight",
)
_GEMMA2_PRE_MLP = f"{_LAYER}.pre_feedforward_layernorm"
GEMMA2 = replace(
    GEMMA,
    name="Gemma-2",
    model_types=("gemma2",),
    linears=_attention() + _gated_mlp(_GEMMA2_PRE_MLP),
    norms=(NormSpec(_PRE_ATTENTION), NormSpec(_GEMMA2_PRE_MLP)),
    untouched=_GEMMA2_POST,
    rotations_refused={"r1": _POST_NORM},
)

# models/gemma3/modeling_gemma3.py, Gemma3ForCausalLM: as Gemma-2 with norms on queries and keys.
GEMMA3 = replace(
    GEMMA2, name="Gemma-3", model_types=("gemma3_text",), untouched=_GEMMA2_POST + _QK_NORMS
)

# models/olmo2/modeling_olmo2.py: attention and MLP read the residual stream itself, their outputs
# are normalised.
OLMO2 = replace(
    LLAMA,
    name="OLMo-2",
    model_types=("olmo2",),
    linears=_attention(None) + _gated_mlp(None),
    norms=(),
    untouched=(
        f"{_LAYER}.post_attention_layernorm.weight",
        f"{_LAYER}.post_feedforward_layernorm.weight",
        *_QK_NORMS,
    ),
    rotations_refused={"r1": _POST_NORM},
)

# models/gpt_neox/modeling_gpt_neox.py: attention and MLP may read the stream in parallel, each
# through a norm of its own; query, key and value of one head follow each other.
_NEOX = "gpt_neox.layers.{i}"
_NEOX_QKV = f"{_NEOX}.attention.query_key_value"
GPT_NEOX = Architecture(
    name="GPT-NeoX",
    model_types=("gpt_neox",),
    linears=(
        LinearSpec(
            _NEOX_QKV,
            Space.RESIDUAL,
            norm=f"{_NEOX}.input_layernorm",
            parts=_QKV,
            interleaved=True,
            captured_at=_NEOX_QKV,
        ),
        LinearSpec(
            f"{_NEOX}.attention.dense",
            Space.VALUE,
            Space.RESIDUAL,
            captured_at=f"{_NEOX}.attention.dense",
        ),
        LinearSpec(
            f"{_NEOX}.mlp.dense_h_to_4h",
            Space.RESIDUAL,
            Space.FFN,
            norm=f"{_NEOX}.post_attention_layernorm",
            captured_at=f"{_NEOX}.mlp.dense_h_to_4h",
        ),
        LinearSpec(f"{_NEOX}.mlp.dense_4h_to_h", Space.FFN, Space.RESIDUAL),
    ),
    norms=(NormSpec(f"{_NEOX}.input_layernorm"), NormSpec(f"{_NEOX}.post_attention_layernorm")),
    final_norm=NormSpec("gpt_neox.final_layer_norm"),
    embeddings=(EmbeddingSpec("gpt_neox.embed_in"),),
    head=LinearSpec("lm_head", Space.RESIDUAL, norm="gpt_neox.final_layer_norm", quantizable=False),
    attention=f"{_NEOX}.attention",
    base_prefix="gpt_neox",
    norm_kind="layer",
    renames=((r"^embed_out\.", "lm_head."),),
)

# models/gpt2/modeling_gpt2.py: learned positions, and Conv1D, which stores [in, out].
_GPT2 = "transformer.h.{i}"
GPT2 = Architecture(
    name="GPT-2",
    model_types=("gpt2",),
    linears=(
        LinearSpec(
            f"{_GPT2}.attn.c_attn",
            Space.RESIDUAL,
            norm=f"{_GPT2}.ln_1",
            layout="conv1d",
            parts=_QKV,
            captured_at=f"{_GPT2}.attn.c_attn",
        ),
        LinearSpec(
            f"{_GPT2}.attn.c_proj",
            Space.VALUE,
            Space.RESIDUAL,
            layout="conv1d",
            captured_at=f"{_GPT2}.attn.c_proj",
        ),
        LinearSpec(
            f"{_GPT2}.mlp.c_fc",
            Space.RESIDUAL,
            Space.FFN,
            norm=f"{_GPT2}.ln_2",
            layout="conv1d",
            captured_at=f"{_GPT2}.mlp.c_fc",
        ),
        LinearSpec(
            f"{_GPT2}.mlp.c_proj", Space.FFN, Space.RESIDUAL, layout="conv1d", width="n_inner"
        ),
    ),
    norms=(NormSpec(f"{_GPT2}.ln_1"), NormSpec(f"{_GPT2}.ln_2")),
    final_norm=NormSpec("transformer.ln_f"),
    embeddings=(EmbeddingSpec("transformer.wte"), EmbeddingSpec("transformer.wpe")),
    head=LinearSpec("lm_head", Space.RESIDUAL, norm="transformer.ln_f", quantizable=False),
    attention=f"{_GPT2}.attn",
    base_prefix="transformer",
    norm_kind="layer",
    refusals=(Refusal(lambda config: config.add_cross_attention, "it has cross-attention layers"),),
    rope=lambda config, layer: False,
)

# models/opt/modeling_opt.py: learned positions.
_OPT = "model.decoder.layers.{i}"
_OPT_ATTENTION = f"{_OPT}.self_attn"
OPT = Architecture(
    name="OPT",
    model_types=("opt",),
    linears=(
        LinearSpec(
            f"{_OPT_ATTENTION}.q_proj",
            Space.RESIDUAL,
            Space.QUERY_KEY,
            norm=f"{_OPT}.self_attn_layer_norm",
            captured_at=f"{_OPT_ATTENTION}.q_proj",
        ),
        LinearSpec(
            f"{_OPT_ATTENTION}.k_proj",
            Space.RESIDUAL,
            Space.QUERY_KEY,
            norm=f"{_OPT}.self_attn_layer_norm",
        ),
        LinearSpec(
            f"{_OPT_ATTENTION}.v_proj",
            Space.RESIDUAL,
            Space.VALUE,
            norm=f"{_OPT}.self_attn_layer_norm",
        ),
        LinearSpec(
            f"{_OPT_ATTENTION}.out_proj",
            Space.VALUE,
            Space.RESIDUAL,
            captured_at=f"{_OPT_ATTENTION}.out_proj",
        ),
        LinearSpec(
            f"{_OPT}.fc1",
            Space.RESIDUAL,
            Space.FFN,
            norm=f"{_OPT}.final_layer_norm",
            captured_at=f"{_OPT}.fc1",
        ),
        LinearSpec(f"{_OPT}.fc2", Space.FFN, Space.RESIDUAL, width="ffn_dim"),
    ),
    norms=(NormSpec(f"{_OPT}.self_attn_layer_norm"), NormSpec(f"{_OPT}.final_layer_norm")),
    final_norm=NormSpec("model.decoder.final_layer_norm"),
    embeddings=(
        EmbeddingSpec("model.decoder.embed_tokens"),
        EmbeddingSpec("model.decoder.embed_positions"),
    ),
    head=LinearSpec(
        "lm_head", Space.RESIDUAL, norm="model.decoder.final_layer_norm", quantizable=False
    ),
    attention=_OPT_ATTENTION,
    norm_kind="layer",
    refusals=(
        Refusal(
            lambda config: not config.do_layer_norm_before,
            "it normalises after adding to the residual stream (do_layer_norm_before is false, as"
            " in OPT-350m)",
        ),
        Refusal(
            lambda config: config.word_embed_proj_dim != config.hidden_size,
            "it projects embeddings into and out of the residual stream (project_in and"
            " project_out)",
        ),
    ),
    rope=lambda config, layer: False,
)

ARCHITECTURES: tuple[Architecture, ...] = (
    LLAMA,
    QWEN3,
    SMOLLM3,
    GEMMA,
    PHI3,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    GPT_NEOX,
    GPT2,
    OPT,
    GEMMA2,
    GEMMA3,
    OLMO2,
)
