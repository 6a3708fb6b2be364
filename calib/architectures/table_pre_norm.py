"""Rows of the table: RMSNorm before attention and MLP, and no experts.

Each row names the modeling file of transformers 5 that it mirrors.
"""

from __future__ import annotations

from dataclasses import replace

from calib.architectures.architecture import Architecture
from calib.architectures.pieces import (
    ALWAYS,
    ATTENTION,
    ATTENTION_BIAS,
    MLP_PROJ,
    PRE_ATTENTION,
    PRE_MLP,
    QK_NORMS,
    QKV,
    QKV_PROJ,
    QKVO_PROJ,
    attention,
    gated_mlp,
    packed_mlp,
    plain_mlp,
)
from calib.architectures.spec import EmbeddingSpec, LinearSpec, NormSpec, Space

# models/llama/modeling_llama.py; Granite's scalar multipliers on embeddings, residuals and logits
# commute with rotations.
LLAMA = Architecture(
    name="Llama",
    model_types=("llama", "granite"),
    linears=attention() + gated_mlp(),
    norms=(NormSpec(PRE_ATTENTION), NormSpec(PRE_MLP)),
    final_norm=NormSpec("model.norm"),
    embeddings=(EmbeddingSpec("model.embed_tokens"),),
    head=LinearSpec("lm_head", Space.RESIDUAL, norm="model.norm", quantizable=False),
    attention=ATTENTION,
    biases={**ATTENTION_BIAS, MLP_PROJ: ("mlp_bias", False)},
)

# models/mistral/modeling_mistral.py; models/ministral3/modeling_ministral3.py multiplies queries by
# a scalar that depends on the position, after RoPE.
MISTRAL = replace(LLAMA, name="Mistral", model_types=("mistral", "ministral3"), biases={})

# models/qwen2/modeling_qwen2.py
QWEN2 = replace(LLAMA, name="Qwen2", model_types=("qwen2",), biases={QKV_PROJ: ALWAYS})

# models/qwen3/modeling_qwen3.py: norms on queries and keys per head, before RoPE.
QWEN3 = replace(
    LLAMA, name="Qwen3", model_types=("qwen3",), untouched=QK_NORMS, biases=ATTENTION_BIAS
)

# models/smollm3/modeling_smollm3.py: no_rope_layers holds 1 for a layer that does use RoPE.
SMOLLM3 = replace(
    LLAMA,
    name="SmolLM3",
    model_types=("smollm3",),
    rope=lambda config, layer: bool(config.no_rope_layers[layer]),
)

# models/gemma/modeling_gemma.py: the norm multiplies by 1 + gain; embeddings are scaled by a
# scalar.
GEMMA = replace(LLAMA, name="Gemma", model_types=("gemma",), gain_offset=1.0, biases=ATTENTION_BIAS)

# models/phi3/modeling_phi3.py: query, key and value in one linear, gate and up in another.
PHI3 = replace(
    LLAMA,
    name="Phi-3",
    model_types=("phi3",),
    linears=(
        LinearSpec(
            f"{ATTENTION}.qkv_proj",
            Space.RESIDUAL,
            norm=PRE_ATTENTION,
            parts=QKV,
            captured_at=f"{ATTENTION}.qkv_proj",
        ),
        LinearSpec(
            f"{ATTENTION}.o_proj", Space.VALUE, Space.RESIDUAL, captured_at=f"{ATTENTION}.o_proj"
        ),
        *packed_mlp(PRE_MLP),
    ),
    biases={},
)

# models/seed_oss/modeling_seed_oss.py: the output projection has a key of its own for its bias.
SEED_OSS = replace(
    LLAMA,
    name="Seed-OSS",
    model_types=("seed_oss",),
    biases={
        QKV_PROJ: ("attention_bias", True),
        "o_proj": ("attention_out_bias", False),
        MLP_PROJ: ("mlp_bias", False),
    },
)

# models/arcee/modeling_arcee.py: an MLP without gate, relu squared.
ARCEE = replace(LLAMA, name="Arcee", model_types=("arcee",), linears=attention() + plain_mlp())

# models/ernie4_5/modeling_ernie4_5.py: RoPE turns neighbouring channels.
ERNIE4_5 = replace(
    LLAMA,
    name="ERNIE 4.5",
    model_types=("ernie4_5",),
    biases={f"{QKVO_PROJ}|{MLP_PROJ}": ("use_bias", False)},
)

# models/helium/modeling_helium.py: RoPE turns neighbouring channels.
HELIUM = replace(
    LLAMA,
    name="Helium",
    model_types=("helium",),
    biases={QKV_PROJ: ("attention_bias", False), MLP_PROJ: ("mlp_bias", False)},
)

# models/hunyuan_v1_dense/modeling_hunyuan_v1_dense.py: norms on queries and keys, after RoPE.
HUNYUAN = replace(
    LLAMA,
    name="Hunyuan",
    model_types=("hunyuan_v1_dense",),
    untouched=(f"{ATTENTION}.query_layernorm.weight", f"{ATTENTION}.key_layernorm.weight"),
    rotations_refused={
        "r3": (
            "it normalises queries and keys after RoPE, and the gain of such a norm (one factor per"
            " channel) does not commute with a rotation of the channels"
        )
    },
    biases=ATTENTION_BIAS,
)

PRE_NORM: tuple[Architecture, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    GEMMA,
    PHI3,
    SEED_OSS,
    ARCEE,
    ERNIE4_5,
    HELIUM,
    HUNYUAN,
)
