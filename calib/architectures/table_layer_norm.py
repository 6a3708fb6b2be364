"""Rows of the table: LayerNorm, whose R1 fixes the all-ones vector.

Each row names the modeling file of transformers 5 that it mirrors.
"""

from __future__ import annotations

from dataclasses import replace

from calib.architectures.architecture import Architecture, Refusal
from calib.architectures.pieces import (
    ALWAYS,
    ATTENTION,
    ATTENTION_BIAS,
    PRE_ATTENTION,
    QK_NORMS,
    QKV,
    QKV_PROJ,
    QKVO_PROJ,
    attention,
    gated_mlp,
    plain_mlp,
)
from calib.architectures.spec import EmbeddingSpec, LinearSpec, NormSpec, Space
from calib.architectures.table_pre_norm import ARCEE, LLAMA

_PARTLY_ROTARY = (
    "its RoPE acts on a slice of every head that is put together with the rest behind it, so that"
    " there is no place between RoPE and the cache where whole heads could be rotated"
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
            parts=QKV,
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
    biases={
        "query_key_value|dense": ("attention_bias", True),
        "dense_h_to_4h|dense_4h_to_h": ALWAYS,
    },
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
            parts=QKV,
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
    biases={"c_attn|c_proj|c_fc": ALWAYS},
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
    biases={f"{QKV_PROJ}|out_proj|fc[12]": ("enable_bias", True)},
)

# models/cohere/modeling_cohere.py and models/cohere2/modeling_cohere2.py: attention and MLP read
# one norm in parallel, and the logits are scaled; in Cohere2 layers without a window have no RoPE.
COHERE = replace(
    LLAMA,
    name="Cohere",
    model_types=("cohere",),
    linears=attention() + gated_mlp(PRE_ATTENTION),
    norms=(NormSpec(PRE_ATTENTION),),
    norm_kind="layer",
    untouched=QK_NORMS,
    biases=ATTENTION_BIAS,
)
COHERE2 = replace(
    COHERE,
    name="Cohere2",
    model_types=("cohere2",),
    untouched=(),
    rope=lambda config, layer: config.layer_types[layer] == "sliding_attention",
)

# models/phi/modeling_phi.py: attention and MLP read one norm in parallel, and the head has a bias.
PHI = replace(
    LLAMA,
    name="Phi",
    model_types=("phi",),
    linears=attention(output="dense") + plain_mlp(PRE_ATTENTION, "fc1", "fc2"),
    norms=(NormSpec(PRE_ATTENTION),),
    final_norm=NormSpec("model.final_layernorm"),
    head=LinearSpec("lm_head", Space.RESIDUAL, norm="model.final_layernorm", quantizable=False),
    norm_kind="layer",
    untouched=tuple(
        f"{ATTENTION}.{part}_layernorm.{name}" for part in "qk" for name in ("weight", "bias")
    ),
    rotations_refused={"r3": _PARTLY_ROTARY},
    biases={f"{QKV_PROJ}|dense|fc[12]|lm_head": ALWAYS},
)

# models/starcoder2/modeling_starcoder2.py
STARCODER2 = replace(
    LLAMA,
    name="StarCoder2",
    model_types=("starcoder2",),
    linears=attention() + plain_mlp(up="c_fc", down="c_proj"),
    norm_kind="layer",
    biases={f"{QKVO_PROJ}|c_fc|c_proj": ("use_bias", True)},
)

# models/stablelm/modeling_stablelm.py
STABLELM = replace(
    LLAMA,
    name="StableLM",
    model_types=("stablelm",),
    norm_kind="layer",
    rotations_refused={"r3": _PARTLY_ROTARY},
    refusals=(
        Refusal(
            lambda config: config.use_parallel_residual,
            "its attention and MLP read one norm in parallel (use_parallel_residual)",
        ),
        Refusal(
            lambda config: config.qk_layernorm,
            "it has a norm for the queries and keys of every single head (qk_layernorm)",
        ),
    ),
    biases={QKV_PROJ: ("use_qkv_bias", False)},
)

# models/nemotron/modeling_nemotron.py: as Arcee with LayerNorm, which multiplies by 1 + gain.
NEMOTRON = replace(
    ARCEE, name="Nemotron", model_types=("nemotron",), norm_kind="layer", gain_offset=1.0
)

LAYER_NORM: tuple[Architecture, ...] = (
    GPT_NEOX,
    GPT2,
    OPT,
    COHERE,
    COHERE2,
    PHI,
    STARCODER2,
    STABLELM,
    NEMOTRON,
)
