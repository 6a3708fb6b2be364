"""What the census is held to."""

from __future__ import annotations

BAR: dict[str, float] = {"": 2e-6}
"""Relative L2 of logits by type, and of all others: float32 summed in another order, some thirty
times over."""

_WRAPPER = "it holds a text model"
_STATES = "keep more than keys and values"
_NO_CACHE = "it keeps no keys and values"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2"),
            *("llama4", "qwen3_5", "qwen3_5_moe"),
        ),
        _WRAPPER,
    ),
    **dict.fromkeys(
        (
            *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "inkling_text", "jamba"),
            *("lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid"),
            *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba"),
            *("zamba2", "zaya", "deepseek_v32", "deepseek_v4", "glm_moe_dsa"),
        ),
        _STATES,
    ),
    **dict.fromkeys(("openai-gpt", "rwkv", "xlnet", "xlstm"), _NO_CACHE),
    "aria_text": "what it does next depends on values",
    "longcat_flash": "what it does next depends on values",
    "bert-generation": "is no causal LM",
    "cpmant": "keeps a state of another form",
    "dbrx": "transformers does not take the config",
    "gemma3n_text": "erf_inv",
    "mpt": "torch.onnx cannot export",
    "xlm": "it is an encoder",
}
"""Types that are refused, and a part of the reason."""
