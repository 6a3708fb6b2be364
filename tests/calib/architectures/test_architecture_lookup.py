"""From a config to its table entry, or to a refusal that says why."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from calib.architectures import architecture_for, supported_model_types, wiring_for
from calib.errors import UnsupportedModelError


def test_supported_model_types_are_sorted_and_unique() -> None:
    names = supported_model_types()
    assert names == sorted(set(names))
    assert {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "granite",
        "smollm3",
        "gemma",
        "gpt_neox",
        "gpt2",
        "opt",
    } <= {*names}
    assert {"mixtral", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3_text", "olmo2"} <= {*names}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BertConfig(), "it is an encoder"),
        (transformers.T5Config(), "an encoder with a decoder"),
        (transformers.Gemma3Config(), "a text model of type 'gemma3_text'"),
        (transformers.RwkvConfig(num_hidden_layers=2), "it keeps no keys and values"),
        (transformers.MambaConfig(), "layers of type linear_attention keep more"),
        (transformers.ViTConfig(), "no causal LM"),
        (object(), "code of its own"),
    ],
)
def test_no_decoder_with_keys_and_values_is_refused_by_name(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        architecture_for(config)
    assert repr(getattr(config, "model_type", "unknown")) in caught.value.message
    assert caught.value.hint


def test_the_text_model_of_a_wrapper_is_said_to_be_in_the_table() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        architecture_for(transformers.Gemma3Config())
    assert "that type is in the table" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.OPTConfig(do_layer_norm_before=False), "OPT-350m"),
        (
            transformers.OPTConfig(hidden_size=64, word_embed_proj_dim=32, num_attention_heads=4),
            "project_in",
        ),
        (transformers.GPT2Config(add_cross_attention=True), "cross-attention"),
    ],
)
def test_features_that_cannot_be_folded_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        architecture_for(config)


def test_quantized_checkpoints_are_refused() -> None:
    config = transformers.LlamaConfig()
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        architecture_for(config)


def test_code_that_comes_with_the_model_is_refused() -> None:
    class CustomConfig(transformers.LlamaConfig):
        pass

    with pytest.raises(UnsupportedModelError, match="code of its own"):
        architecture_for(CustomConfig())


def test_head_dim_is_read_from_the_config() -> None:
    config = transformers.Qwen3Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=24
    )
    sizes = wiring_for(config).sizes
    assert (sizes.head_dim, sizes.group) == (24, 2)
    config = transformers.GPT2Config(n_embd=60, n_head=4)
    sizes = wiring_for(config).sizes
    assert (sizes.head_dim, sizes.kv_heads, sizes.group) == (15, 4, 1)
