"""Attention that caps its scores is computed with the cap, which transformers' default function
leaves out.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from calib.modules.attention import attention_implementation
from calib.network.skeleton import build_skeleton, portable_config
from tests.tiny import CONFIGS, SIZES, make_tiny, relative_l2, token_rows
from tests.tolerances import SAME_SUMS


def test_a_capped_model_is_the_one_that_its_makers_published() -> None:
    config: Any = transformers.Gemma2Config(
        **SIZES | {"num_attention_heads": 4},
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
    )
    tiny = make_tiny(config)
    stock = tiny.model(torch.float32)
    ids = token_rows()[0][None]
    stock.set_attn_implementation("eager")  # transformers' own function that does cap
    state = {
        name: tensor.float() for name, tensor in tiny.state.items() if name != "lm_head.weight"
    }
    config.tie_word_embeddings = False
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    ours = build_skeleton(portable_config(config), state, skip=())
    with torch.no_grad():
        wanted = stock(ids).logits
        assert relative_l2(ours(ids).logits, wanted) <= SAME_SUMS
        stock.set_attn_implementation("sdpa")
        assert relative_l2(stock(ids).logits, wanted) > 1e-3  # the cap matters here


def test_other_models_keep_the_fused_function() -> None:
    for name in ("llama", "gemma3", "gpt2"):
        assert attention_implementation(CONFIGS[name]()) == "sdpa"
