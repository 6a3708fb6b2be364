"""Llama, Mistral and Qwen2 in Tripy, under the keys of Hugging Face.

B = batch, T = tokens, D = model width, H = query heads, K = key and value heads, d = head width, V
= vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nvtripy as tp

from backends.safetensors.source import sliding_window
from backends.safetensors.tripy.modules.layers import (
    ACTIVATIONS,
    Prefix,
    RMSNorm,
    attention,
    positions,
)
from backends.safetensors.tripy.modules.linear import make_linear
from backends.safetensors.tripy.modules.plan import ModulePlan

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Rope:
    """Rotary position embeddings. The frequencies are transformers' own, whatever their kind;
    angles are float32.
    """

    def __init__(self, config: PretrainedConfig, first: int = 0) -> None:
        """
        Args:
            config: of the model.
            first: position of the first token.
        """
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        source: Any = LlamaRotaryEmbedding(config)
        self.frequencies: list[float] = source.inv_freq.double().tolist()
        self.first = first
        self.scaling = float(source.attention_scaling)

    def tables(self, tokens: tp.DimensionSize, dtype: tp.dtype) -> tuple[tp.Tensor, tp.Tensor]:
        """Cosines and sines ``[T, d]`` of ``tokens`` positions from the first one on."""
        position = tp.reshape(positions(tokens, self.first, tp.float32), (tokens, 1))
        angles = position * tp.reshape(tp.Tensor(self.frequencies), (1, len(self.frequencies)))
        angles = tp.concatenate([angles, angles], dim=1)
        return tp.cast(tp.cos(angles) * self.scaling, dtype), tp.cast(
            tp.sin(angles) * self.scaling, dtype
        )


def _rotate(x: tp.Tensor, tables: tuple[tp.Tensor, tp.Tensor]) -> tp.Tensor:
    """``x cos + (-x2, x1) sin`` with ``x = (x1, x2)``, over ``[B, heads, T, d]``."""
    cosines, sines = tables
    first, second = tp.split(x, 2, dim=3)
    return x * cosines + tp.concatenate([-second, first], dim=3) * sines


class _Attention(tp.Module):  # type: ignore[misc]
    def __init__(self, plan: ModulePlan, layer: int, dtype: tp.dtype) -> None:
        super().__init__()
        config, name = plan.config, f"model.layers.{layer}.self_attn"
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.window = sliding_window(config, layer)
        self.before = plan.prefix
        self.q_proj = make_linear(plan.linears[f"{name}.q_proj"], dtype)
        self.k_proj = make_linear(plan.linears[f"{name}.k_proj"], dtype)
        self.v_proj = make_linear(plan.linears[f"{name}.v_proj"], dtype)
        self.o_proj = make_linear(plan.linears[f"{name}.o_proj"], dtype)
        if self.before:
            self.prefix = Prefix(self.kv_heads, self.before, self.head_dim, dtype)

    def forward(self, x: tp.Tensor, tables: tuple[tp.Tensor, tp.Tensor]) -> tp.Tensor:
        batch, tokens = x.shape[0], x.shape[1]

        def split(projected: tp.Tensor, heads: int) -> tp.Tensor:
            return tp.transpose(tp.reshape(projected, (batch, tokens, heads, self.head_dim)), 1, 2)

        query = _rotate(split(self.q_proj(x), self.heads), tables)
        key = _rotate(split(self.k_proj(x), self.kv_heads), tables)
        value = split(self.v_proj(x), self.kv_heads)
        if self.before:
            key, value = self.prefix(key, value)
        # Query heads h = k H/K + g share key head k; the keys broadcast over g.
        grouped = (batch, self.kv_heads, self.heads // self.kv_heads, tokens, self.head_dim)
        out = attention(
            tp.reshape(query, grouped),
            tp.unsqueeze(key, 2),
            tp.unsqueeze(value, 2),
            self.head_dim**-0.5,
            self.window,
            self.before,
        )
        out = tp.transpose(tp.reshape(out, (batch, self.heads, tokens, self.head_dim)), 1, 2)
        return self.o_proj(tp.reshape(out, (batch, tokens, self.heads * self.head_dim)))


class _MLP(tp.Module):  # type: ignore[misc]
    def __init__(self, plan: ModulePlan, prefix: str, dtype: tp.dtype) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[plan.config.hidden_act]
        self.gate_proj = make_linear(plan.linears[f"{prefix}.gate_proj"], dtype)
        self.up_proj = make_linear(plan.linears[f"{prefix}.up_proj"], dtype)
        self.down_proj = make_linear(plan.linears[f"{prefix}.down_proj"], dtype)

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class _Layer(tp.Module):  # type: ignore[misc]
    def __init__(self, plan: ModulePlan, layer: int, dtype: tp.dtype) -> None:
        super().__init__()
        width, eps = plan.config.hidden_size, plan.config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = _Attention(plan, layer, dtype)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = _MLP(plan, f"model.layers.{layer}.mlp", dtype)

    def forward(self, x: tp.Tensor, tables: tuple[tp.Tensor, tp.Tensor]) -> tp.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Decoder(tp.Module):  # type: ignore[misc]
    def __init__(self, plan: ModulePlan, dtype: tp.dtype) -> None:
        super().__init__()
        config = plan.config
        self.dtype = dtype
        self.rope = Rope(config, plan.prefix)
        self.embed_tokens = tp.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = [_Layer(plan, layer, dtype) for layer in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: tp.Tensor) -> tp.Tensor:
        x = self.embed_tokens(input_ids)
        tables = self.rope.tables(input_ids.shape[1], self.dtype)
        for layer in self.layers:
            x = layer(x, tables)
        return self.norm(x)


class Llama(tp.Module):  # type: ignore[misc]
    """A Llama-family model over whole sequences, without padding or cache, behind the plan's
    prefix.
    """

    def __init__(self, plan: ModulePlan) -> None:
        """
        Args:
            plan: of a ``llama``, ``mistral`` or ``qwen2`` model.
        """
        super().__init__()
        dtype = getattr(tp, plan.dtype)
        self.model = _Decoder(plan, dtype)
        self.lm_head = make_linear(plan.linears["lm_head"], dtype)

    def forward(self, input_ids: tp.Tensor) -> tp.Tensor:
        """``[B, T]`` int32 to logits ``[B, T, V]``."""
        return self.lm_head(self.model(input_ids))
