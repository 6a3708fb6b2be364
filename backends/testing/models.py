"""Tiny random models, quantized: small enough for hundreds of exports, with everything in them that
large ones have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calib.architectures import Kind, wiring_for
from calib.artifact import Provenance, QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.fusing import fuse
from calib.network.skeleton import build_on_meta
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.rotations.rotation_set import hadamard_rotations
from calib.schemes import Scheme

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCABULARY = 97
# Widths are multiples of 128: a target may ask for whole blocks, and some ask for that one.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama() -> PretrainedConfig:
    from transformers import LlamaConfig  # here, because it takes seconds to import

    return LlamaConfig(**_SIZES)


def _qwen2() -> PretrainedConfig:
    from transformers import Qwen2Config

    return Qwen2Config(**_SIZES, tie_word_embeddings=True)


def _gpt2() -> PretrainedConfig:
    from transformers import GPT2Config

    return GPT2Config(**_GPT2)


FAMILIES: Mapping[str, Callable[[], PretrainedConfig]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
}
"""Configs by family: grouped-query attention; biases and tied embeddings; LayerNorm, Conv1D and a
fused qkv.
"""


def token_rows(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random token rows, int64 ``[length]`` each, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


@cache
def tiny_model(
    family: str,
    scheme: Scheme,
    *,
    rotate: tuple[Kind, ...] = (),
    dtype: torch.dtype = torch.float32,
    kv: str | None = None,
    overrides: tuple[tuple[str, str], ...] = (),
) -> QuantizedModel:
    """A random model of ``family``, rotated and quantized; the same one for the same arguments.

    Args:
        family: one of :data:`FAMILIES`.
        scheme: how its linears are quantized.
        rotate: rotations; those that the architecture refuses are left out.
        dtype: what the target computes in.
        kv: how the KV cache is quantized; a key of :data:`calib.schemes.KV_SCHEMES`.
        overrides: scheme names by pattern of linear names.
    """
    config = FAMILIES[family]()
    wiring = wiring_for(config)
    kinds: Iterable[Kind] = (kind for kind in rotate if wiring.refusal(kind) is None)
    rotations = hadamard_rotations(wiring, kinds, seed=1)
    fused = fuse(_state(config), wiring, rotations, dtype=dtype)
    quantization = resolve(scheme, wiring, overrides=dict(overrides), kv=kv)
    loop = forward_loop_over(length_batches(token_rows(9, 12, 7, 9), 4))

    return quantize_model(fused, quantization, loop, _PROVENANCE)


def _state(config: PretrainedConfig) -> dict[str, Tensor]:
    """Random weights by checkpoint key, large enough that each of them moves the logits."""
    generator = torch.Generator().manual_seed(0)
    network = build_on_meta(config)
    state: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        gain = "norm" in name or "ln_" in name
        state[name] = 0.2 * noise + (1.0 if gain and name.endswith("weight") else 0.0)
    return state


_PROVENANCE = Provenance(
    source="tiny",
    fingerprint="0" * 64,
    recipe={"seed": 0},
    parameters=0,
    nbytes=0,
    calibration_rows=4,
    calibration_tokens=37,
    calibration_sha256="0" * 64,
    versions={"rotq": "0"},
)
