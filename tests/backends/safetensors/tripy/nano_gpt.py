"""A GPT-2 as NVIDIA's nanoGPT example for Tripy builds it: ``tp.Linear`` by quantization mode,
norms in float32, and a causal mask that the attention module makes itself. It imports nvtripy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nvtripy as tp
import torch


@dataclass
class Sizes:
    vocabulary: int = 97
    positions: int = 64
    width: int = 48
    heads: int = 4
    layers: int = 2
    dtype: Any = tp.float32
    mode: str | None = None


def linear(
    sizes: Sizes, inputs: int, outputs: int, *, bias: bool = True, quantized: bool = True
) -> Any:
    modes: dict[str | None, dict[str, Any]] = {
        None: {},
        "int8-weight-only": {"quant_dtype": tp.int8, "weight_quant_dim": 0},
        "int4-weight-only": {"quant_dtype": tp.int4, "weight_quant_dim": None},
        "float8": {"quant_dtype": tp.float8, "weight_quant_dim": None},
    }
    return tp.Linear(
        inputs, outputs, bias=bias, dtype=sizes.dtype, **modes[sizes.mode if quantized else None]
    )


class Attention(tp.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.c_attn = linear(sizes, sizes.width, 3 * sizes.width)
        self.c_proj = linear(sizes, sizes.width, sizes.width)
        mask = torch.ones(sizes.positions, sizes.positions).tril()[None, None].contiguous()
        self.bias = tp.Tensor(mask)

    def forward(self, x: Any) -> Any:
        batch, tokens = x.shape[0], x.shape[1]
        heads, width = self.sizes.heads, self.sizes.width // self.sizes.heads
        parts = tp.split(self.c_attn(x), 3, dim=2)
        query, key, value = (
            tp.transpose(tp.reshape(p, (batch, tokens, heads, width)), 1, 2) for p in parts
        )
        scores = (query @ tp.transpose(key, -2, -1)) * width**-0.5
        scores = tp.masked_fill(scores, self.bias[:, :, :tokens, :tokens] == 0.0, float("-inf"))
        mixed = tp.transpose(tp.softmax(scores, dim=-1) @ value, 1, 2)
        return self.c_proj(tp.reshape(mixed, (batch, tokens, self.sizes.width)))


class MLP(tp.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.c_fc = linear(sizes, sizes.width, 4 * sizes.width)
        self.c_proj = linear(sizes, 4 * sizes.width, sizes.width)

    def forward(self, x: Any) -> Any:
        return self.c_proj(tp.gelu(self.c_fc(x)))


class Block(tp.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1 = tp.LayerNorm(sizes.width)
        self.attn = Attention(sizes)
        self.ln_2 = tp.LayerNorm(sizes.width)
        self.mlp = MLP(sizes)

    def forward(self, x: Any) -> Any:
        x = x + self.attn(tp.cast(self.ln_1(tp.cast(x, tp.float32)), x.dtype))
        return x + self.mlp(tp.cast(self.ln_2(tp.cast(x, tp.float32)), x.dtype))


class Transformer(tp.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.wte = tp.Embedding(sizes.vocabulary, sizes.width, dtype=sizes.dtype)
        self.wpe = tp.Embedding(sizes.positions, sizes.width, dtype=sizes.dtype)
        self.h = [Block(sizes) for _ in range(sizes.layers)]
        self.ln_f = tp.LayerNorm(sizes.width)

    def forward(self, ids: Any) -> Any:
        x = self.wte(ids) + self.wpe(tp.arange(ids.shape[1], dtype=tp.int32))
        for block in self.h:
            x = block(x)
        return tp.cast(self.ln_f(tp.cast(x, tp.float32)), x.dtype)


class GPT(tp.Module):
    """Its output head is quantized in float8 mode only."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.transformer = Transformer(sizes)
        self.lm_head = linear(
            sizes, sizes.width, sizes.vocabulary, bias=False, quantized=sizes.mode == "float8"
        )

    def forward(self, ids: Any) -> Any:
        return self.lm_head(self.transformer(ids))
