"""A tiny random Llama with grouped heads of a width that is not hidden / heads, and how to capture
from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from calib.capture.session import capture
from calib.capture.sites import CaptureConfig, CaptureSite
from calib.capture.storage import Capture
from calib.data.batches import Batch, length_batches

LAYERS, HIDDEN, HEADS, KV, HEAD_DIM, VOCABULARY = 2, 32, 4, 2, 16, 64
SMALL = CaptureConfig(reservoir_tokens=64, r2_tokens=32, massive_fraction=0.25, seed=1)
ALL = CaptureConfig(reservoir_tokens=4096, r2_tokens=4096, seed=1)


def build_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def run(
    model: nn.Module,
    sites: Sequence[CaptureSite],
    rows: Sequence[Tensor] | Sequence[Batch],
    config: CaptureConfig = SMALL,
    batch_size: int = 4,
) -> Capture:
    """Capture with the head counts of the tiny Llama; plain rows are batched by length."""
    batches = [item for item in rows if isinstance(item, Batch)] or length_batches(
        [row for row in rows if isinstance(row, Tensor)], batch_size
    )
    return capture(model, sites, batches, num_kv_heads=KV, head_dim=HEAD_DIM, config=config)
