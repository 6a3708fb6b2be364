"""A tiny config of every type that transformers has a causal LM of: two layers, 64 wide.

Sizes are set where the config class has them under one of the usual names; what a type wants
besides is in :data:`OVERRIDES`.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

VOCABULARY = 97
WINDOW = 8
"""Of sliding windows, less than the texts of the census are long."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "n_inner": 96,
    "ffn_dim": 96,
    "dff": 96,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "sliding_window": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
# head_dim is what latent attention calls the width of its rotated part
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
    },
    "gemma4_unified_text": {"global_head_dim": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": _LATENT | {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32},
}
AS_THEY_ARE = frozenset({"mamba2", "recurrent_gemma", "zamba", "zamba2", "zaya"})
"""Types that are refused by their config, whose classes take no other sizes without much ado."""
"""By type, what the class needs besides."""
NO_DECODERS = frozenset(
    {
        *("git", "moshi", "musicgen", "musicgen_melody", "blt", "mllama", "trocr", "whisper"),
        *("gemma4_assistant", "gemma4_unified_assistant"),
    }
)
"""Parts of models of images and sound, and drafts of another model, which transformers lists among
causal LMs."""


def decoder_types() -> list[str]:
    """The types of decoders of text, sorted: no encoder, and no encoder with a decoder."""
    return [
        name
        for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if name not in NO_DECODERS and not _encodes(name)
    ]


def tiny_config(name: str) -> Any:
    """The tiny config of a type."""
    default = CONFIG_MAPPING[name]()
    if name in AS_THEY_ARE:
        return default
    known = default.to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known}
    kinds = set(known.get("layer_types") or ())
    if {"sliding_attention", "full_attention"} <= kinds:
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    return CONFIG_MAPPING[name](**sizes | OVERRIDES.get(name, {}))


def _encodes(name: str) -> bool:
    config = CONFIG_MAPPING[name]()
    masked = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bool(
        getattr(config, "is_encoder_decoder", False)
        or (masked and not getattr(config, "is_decoder", True))
    )


def seeded_model(config: Any) -> Any:
    """A random model of ``config`` in float32, with transformers' eager attention."""
    import torch

    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)
