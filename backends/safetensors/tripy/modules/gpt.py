"""GPT-2 in Tripy, under the keys of NVIDIA's nanoGPT example. B = batch, T = tokens, D = width, V =
vocabulary.
"""

from __future__ import annotations

import nvtripy as tp

from backends.safetensors.tripy.modules.layers import (
    ACTIVATIONS,
    LayerNorm,
    Prefix,
    attention,
    positions,
)
from backends.safetensors.tripy.modules.linear import make_linear
from backends.safetensors.tripy.modules.plan import ModulePlan


class _Attention(tp.Module):  # type: ignore[misc]
    def __init__(self, plan: ModulePlan, name: str, dtype: tp.dtype) -> None:
        super().__init__()
        self.heads = plan.config.n_head
        self.width = plan.config.n_embd
        self.before = plan.prefix
        self.c_attn = make_linear(plan.linears[f"{name}.c_attn"], dtype)
        self.c_proj = make_linear(plan.linears[f"{name}.c_proj"], dtype)
        if self.before:
            self.prefix = Prefix(self.heads, self.before, self.width // self.heads, dtype)

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        batch, tokens = x.shape[0], x.shape[1]
        head_dim = self.width // self.heads
        split = (batch, tokens, self.heads, head_dim)
        query, key, value = (
            tp.transpose(tp.reshape(part, split), 1, 2)
            for part in tp.split(self.c_attn(x), 3, dim=2)
        )
        if self.before:
            key, value = self.prefix(key, value)
        out = attention(query, key, value, head_dim**-0.5, None, self.before)
        return self.c_proj(tp.reshape(tp.transpose(out, 1, 2), (batch, tokens, self.width)))


class _MLP(tp.Module):  # type: ignore[misc]
    def __init__(self, plan: ModulePlan, prefix: str, dtype: tp.dtype) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[plan.config.activation_function]
        self.c_fc = make_linear(plan.linears[f"{prefix}.c_fc"], dtype)
        self.c_proj = make_linear(plan.linears[f"{prefix}.c_proj"], dtype)

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class _Block(tp.Module):  # type: ignore[misc]
    def __init__(self, plan: ModulePlan, prefix: str, dtype: tp.dtype) -> None:
        super().__init__()
        width, eps = plan.config.n_embd, plan.config.layer_norm_epsilon
        self.ln_1 = LayerNorm(width, eps)
        self.attn = _Attention(plan, f"{prefix}.attn", dtype)
        self.ln_2 = LayerNorm(width, eps)
        self.mlp = _MLP(plan, f"{prefix}.mlp", dtype)

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _Transformer(tp.Module):  # type: ignore[misc]
    def __init__(self, plan: ModulePlan, dtype: tp.dtype) -> None:
        super().__init__()
        config = plan.config
        self.before = plan.prefix
        self.wte = tp.Embedding(config.vocab_size, config.n_embd, dtype=dtype)
        self.wpe = tp.Embedding(config.n_positions, config.n_embd, dtype=dtype)
        self.h = [_Block(plan, f"transformer.h.{layer}", dtype) for layer in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def forward(self, input_ids: tp.Tensor) -> tp.Tensor:
        position = positions(input_ids.shape[1], self.before, tp.int32)
        x = self.wte(input_ids) + self.wpe(position)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT(tp.Module):  # type: ignore[misc]
    """GPT-2 over whole sequences, without padding or cache, behind the plan's prefix."""

    def __init__(self, plan: ModulePlan) -> None:
        """
        Args:
            plan: of a ``gpt2`` model.
        """
        super().__init__()
        dtype = getattr(tp, plan.dtype)
        self.transformer = _Transformer(plan, dtype)
        self.lm_head = make_linear(plan.linears["lm_head"], dtype)

    def forward(self, input_ids: tp.Tensor) -> tp.Tensor:
        """``[B, T]`` int32 to logits ``[B, T, V]``."""
        return self.lm_head(self.transformer(input_ids))
