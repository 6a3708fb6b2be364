"""The table against the module trees that transformers builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from calib.architectures import Space, Wiring, wiring_for
from calib.errors import RotationError
from calib.network.skeleton import expected_tensors
from tests.rows import ROWS

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GATED = SMALL | {"intermediate_size": 24, "num_key_value_heads": 2}
MOE = {"num_experts": 4, "moe_intermediate_size": 20, "num_experts_per_tok": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**GATED),
    "qwen2": lambda: transformers.Qwen2Config(**GATED),
    "granite": lambda: transformers.GraniteConfig(**GATED),
    "qwen3": lambda: transformers.Qwen3Config(**GATED),
    "smollm3": lambda: transformers.SmolLM3Config(**GATED),
    "gemma": lambda: transformers.GemmaConfig(**GATED),
    "phi3": lambda: transformers.Phi3Config(**GATED),
    "mixtral": lambda: transformers.MixtralConfig(**GATED, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**GATED, **MOE, decoder_sparse_step=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**GATED, **MOE, mlp_only_layers=[1]),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=24),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=4),
    "opt": lambda: transformers.OPTConfig(**SMALL, word_embed_proj_dim=16, ffn_dim=24),
    "gemma2": lambda: transformers.Gemma2Config(**GATED),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**GATED),
    "olmo2": lambda: transformers.Olmo2Config(**GATED),
}


@pytest.fixture(params=[*CONFIGS, *ROWS])
def case(request: pytest.FixtureRequest) -> tuple[Wiring, nn.Module]:
    config = (CONFIGS | ROWS)[request.param]()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return wiring_for(config), model


def test_every_linear_of_the_model_is_in_the_table(
    case: tuple[Wiring, nn.Module],
) -> None:
    wiring, model = case
    linears = {
        name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)
    }
    table = [spec for spec in wiring.linears if spec.layout != "experts"]
    # a module class of its own
    routers = {
        spec.name
        for spec in table
        if type(model.get_submodule(spec.name)).__name__.endswith("Router")
    }
    assert {spec.name for spec in table} - routers == linears
    assert set(wiring.linear_names) == {
        name for name in linears if name != "lm_head" and not name.endswith("shared_expert_gate")
    }


def test_layout_and_parts_fit_the_weights(case: tuple[Wiring, nn.Module]) -> None:
    wiring, _ = case
    shapes = expected_tensors(wiring.config)
    sizes = wiring.sizes
    widths = {
        Space.RESIDUAL: sizes.hidden,
        Space.VALUE: sizes.heads * sizes.head_dim,
    }
    for spec in wiring.linears:
        out, into = (
            shapes[spec.weight][-2:] if spec.layout != "conv1d" else reversed(shapes[spec.weight])
        )
        width = wiring.ffn_width(spec) if spec.reads is Space.FFN else widths[spec.reads]
        assert into == width
        if spec.writes is Space.RESIDUAL:
            assert out == sizes.hidden
        roles = [part.role for part in spec.parts]
        if roles == ["query", "key", "value"]:
            rows = [
                row
                for role in roles
                for part in spec.part(role, sizes)
                for row in range(part.start, part.stop)
            ]
            assert sorted(rows) == list(range(out))


def test_every_norm_of_the_residual_stream_is_in_the_table(
    case: tuple[Wiring, nn.Module],
) -> None:
    wiring, model = case
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    untouched = {name.rpartition(".")[0] for name in wiring.untouched}
    assert set(wiring.norm_names) | untouched == norms
    for norm in wiring.norm_names:
        assert wiring.readers(norm)


def test_sites_are_modules_in_the_order_they_run(case: tuple[Wiring, nn.Module]) -> None:
    wiring, model = case
    sites = wiring.capture_sites
    modules = dict(model.named_modules())
    assert all(site.module in modules for site in sites)
    layers = wiring.layers
    assert [(site.layer, site.space) for site in sites if site.rotation == "r2"] == [
        (i, "value") for i in layers
    ]
    residual = [site.layer for site in sites if site.rotation == "r1"]
    refused = wiring.refusal("r1") is not None
    assert residual == ([] if refused else [i for i in layers for _ in ("attention", "mlp")])
    assert [site.layer for site in sites] == sorted(site.layer for site in sites)


def test_sites_of_a_llama() -> None:
    config = CONFIGS["llama"]()
    sites = wiring_for(config).capture_sites[:3]
    assert [(site.module, site.rotation) for site in sites] == [
        ("model.layers.0.self_attn.q_proj", "r1"),
        ("model.layers.0.self_attn.o_proj", "r2"),
        ("model.layers.0.mlp.up_proj", "r1"),
    ]


def test_sparse_layers_are_told_from_dense_ones() -> None:
    config = CONFIGS["qwen2_moe"]()  # every second layer has experts
    wiring = wiring_for(config)
    assert wiring.expert_parameters == (
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    )
    widths = [(spec.branch, wiring.ffn_width(spec)) for spec in wiring.ffn_readers(1)]
    assert widths == [("", 20), ("shared", config.shared_expert_intermediate_size)]
    assert [spec.name for spec in wiring.ffn_readers(0)] == ["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2"])
def test_post_norms_refuse_r1_and_nothing_else(model_type: str) -> None:
    config = CONFIGS[model_type]()
    wiring = wiring_for(config)
    reason = wiring.refusal("r1")
    assert reason is not None
    assert "does not commute" in reason
    assert [wiring.refusal(kind) for kind in ("r2", "r3", "r4")] == [None, None, None]


def test_unknown_rotation_is_an_error() -> None:
    config = CONFIGS["llama"]()
    with pytest.raises(RotationError, match="no rotation 'r5'"):
        wiring_for(config).refusal("r5")
