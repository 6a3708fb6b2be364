"""Tiny configs of families that the census proves as a whole (``make census``).

A family is a row of the architecture table and a config here. The default suite derives its wiring,
folds it in float64 and reads its names; tracing it, and whatever else takes seconds, is marked
``census``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers

from tests.tiny import CONFIGS, SIZES

_FOUR_HEADS = SIZES | {"num_attention_heads": 4}
"""Heads of 12 channels."""
_EXPERTS = {"num_experts_per_tok": 2}

ROWS: dict[str, Callable[[], Any]] = {
    "ministral3": lambda: transformers.Ministral3Config(
        **SIZES,
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.3,
        },
    ),
    "seed_oss": lambda: transformers.SeedOssConfig(
        **SIZES, head_dim=12, attention_out_bias=True, mlp_bias=True
    ),
    "arcee": lambda: transformers.ArceeConfig(**SIZES, mlp_bias=True),
    "ernie4_5": lambda: transformers.Ernie4_5Config(**SIZES, head_dim=12, use_bias=True),
    "helium": lambda: transformers.HeliumConfig(**SIZES, head_dim=8, attention_bias=True),
    "hunyuan_v1_dense": lambda: transformers.HunYuanDenseV1Config(
        **SIZES, head_dim=12, tie_word_embeddings=True
    ),
    "olmo3": lambda: transformers.Olmo3Config(
        **SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "exaone4": lambda: transformers.Exaone4Config(
        **SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "glm4": lambda: transformers.Glm4Config(**_FOUR_HEADS, head_dim=16),
    "cohere": lambda: transformers.CohereConfig(**SIZES, use_qk_norm=True, logit_scale=0.25),
    "cohere2": lambda: transformers.Cohere2Config(
        **SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": lambda: transformers.PhiConfig(**_FOUR_HEADS, qk_layernorm=True),
    "starcoder2": lambda: transformers.Starcoder2Config(**SIZES, sliding_window=4),
    "stablelm": lambda: transformers.StableLmConfig(**SIZES, use_qkv_bias=True),
    "nemotron": lambda: transformers.NemotronConfig(**SIZES),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZES, **_EXPERTS, num_experts=4),
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        **SIZES,
        **_EXPERTS,
        num_local_experts=4,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        logits_scaling=8.0,
    ),
    "phimoe": lambda: transformers.PhimoeConfig(
        **SIZES, **_EXPERTS, num_local_experts=4, attention_bias=True, lm_head_bias=True
    ),
}

EVERY = CONFIGS | ROWS

WHOLE = [*CONFIGS, *(pytest.param(name, marks=pytest.mark.census) for name in ROWS)]
"""Names of :data:`EVERY` to parametrize by: those of :data:`ROWS` in the census alone."""
