"""Tiny random models of every family in the table, and what the pipeline makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from calib.architectures import Kind, Wiring, wiring_for
from calib.artifact import Provenance, QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.fusing import FusedModel, fuse
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.rotations.rotation_set import Rotation, RotationSet, fused_rotation, hadamard_rotations
from calib.rotations.starts import haar_start
from calib.schemes import scheme_named

VOCABULARY = 97
# Sizes that no power of two divides evenly: 48 = 4 * 12, 88 = 8 * 11 (a Paley order), 3 query heads
# per KV head.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "decoder_sparse_step": 1,
}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
OPT = {key: value for key, value in NEOX.items() if key != "intermediate_size"} | {
    "ffn_dim": 88,
    "word_embed_proj_dim": 48,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "bos_token_id": 1,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-bias-tied-headdim": lambda: transformers.LlamaConfig(
        **SIZES, head_dim=12, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-odd": lambda: transformers.LlamaConfig(
        **SIZES
        | {
            "hidden_size": 45,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "intermediate_size": 99,
        },
        head_dim=10,
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=20, attention_bias=True),
    "granite": lambda: transformers.GraniteConfig(
        **SIZES,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        logits_scaling=8.0,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**SIZES, no_rope_layer_interval=2),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**SIZES, tie_word_embeddings=True),
    "phi3-partial-rope": lambda: transformers.Phi3Config(
        **SIZES | {"num_attention_heads": 4},
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **MOE | {"decoder_sparse_step": 2}, shared_expert_intermediate_size=56
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, **MOE, head_dim=16, mlp_only_layers=[0]
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX, rope_parameters={"rope_theta": 1e4}),
    "gpt_neox-serial-nobias": lambda: transformers.GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True
    ),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2-untied-inner": lambda: transformers.GPT2Config(
        **GPT2, n_inner=88, tie_word_embeddings=False
    ),
    "opt": lambda: transformers.OPTConfig(**OPT),
    "opt-nobias": lambda: transformers.OPTConfig(**OPT, enable_bias=False),
    "opt-noaffine": lambda: transformers.OPTConfig(**OPT, layer_norm_elementwise_affine=False),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES | {"num_attention_heads": 4},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES | {"num_attention_heads": 4},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
}


def wide_llama() -> Any:
    """A Llama whose widths are multiples of 32, as the formats with fixed blocks have it."""
    sizes = SIZES | {"hidden_size": 96, "intermediate_size": 64}
    return transformers.LlamaConfig(**sizes, head_dim=16)


@dataclass
class Tiny:
    """A random model: its wiring, and its state dict in float64."""

    wiring: Wiring
    state: dict[str, Tensor]

    @property
    def config(self) -> Any:
        return self.wiring.config

    def model(self, dtype: torch.dtype = torch.float64) -> Any:
        """The reference, built by transformers alone."""
        # The fused kernel, which is the default, has no cap on scores and leaves it out without a
        # word.
        attention = "eager" if getattr(self.config, "attn_logit_softcapping", None) else None
        model: Any = transformers.AutoModelForCausalLM.from_config(
            self.config, dtype=dtype, attn_implementation=attention
        ).eval()
        model.load_state_dict(self.state)
        if self.wiring.architecture.experts is not None:
            model.set_experts_implementation("eager")  # the default kernel has no float64
        return model

    def offered(self) -> list[Kind]:
        """The rotations that are not refused."""
        kinds: tuple[Kind, ...] = ("r1", "r2", "r3", "r4")
        return [kind for kind in kinds if self.wiring.refusal(kind) is None]

    def rotations(self, kinds: list[Kind], signs: int | None = None) -> RotationSet:
        """Dense random R1 and R2, another one for every layer and KV head, and Hadamard R3 and
        R4.

        ``signs`` is their seed: rotq makes R3 and R4 without signs, and takes what has them.
        """
        sizes = self.wiring.sizes
        result: list[Rotation] = []
        if "r1" in kinds:
            layer_norm = self.wiring.layer_norm
            result.append(fused_rotation("r1", haar_start(sizes.hidden, 1, fix_ones=layer_norm)))
        if "r2" in kinds:
            for layer in range(sizes.layers):
                heads = [
                    haar_start(sizes.head_dim, 10 * layer + head) for head in range(sizes.kv_heads)
                ]
                result.append(fused_rotation("r2", torch.stack(heads), layer=layer))
        online = [kind for kind in kinds if kind in ("r3", "r4")]
        made = hadamard_rotations(self.wiring, online)
        return RotationSet(result).merged(
            replace(rotation, seed=signs) for rotation in made.values()
        )


def make_tiny(config: Any) -> Tiny:
    """A model with random weights, gains and biases, large enough that every one of them moves the
    logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            )
        for name, parameter in model.named_parameters():
            if "embed" in name or "wte" in name:  # a mean that a wrong centring would remove
                parameter.add_(0.1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Tiny(wiring_for(config), state)


PROVENANCE = Provenance(
    source="tiny",
    fingerprint="f" * 64,
    recipe={"scheme": "int8", "seed": 0},
    parameters=12345,
    nbytes=49380,
    calibration_rows=5,
    calibration_tokens=43,
    calibration_sha256="c" * 64,
    versions={"rotq": "0.1.0"},
    gate=({"rotate": "none", "kl": 0.5},),
)
LENGTHS = (9, 12, 7, 9, 6)
"""Rows of different lengths, so that a batch of them would need padding."""


def token_rows(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[Tensor]:
    """Random token rows without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def fuse_tiny(
    tiny: Tiny,
    kinds: Sequence[Kind] = (),
    dtype: torch.dtype = torch.float32,
    signs: int | None = None,
    *,
    fold_norms: bool = True,
) -> FusedModel:
    """The model with its norms and, where they are offered, the rotations ``kinds`` folded in; see
    :meth:`Tiny.rotations` for ``signs``, :func:`calib.fusing.fuse` for ``fold_norms``.
    """
    rotations = tiny.rotations([kind for kind in kinds if kind in tiny.offered()], signs)
    return fuse(tiny.state, tiny.wiring, rotations, dtype=dtype, fold_norms=fold_norms)


def quantize_fused(fused: FusedModel, scheme: str = "int8", batch_size: int = 4) -> QuantizedModel:
    """Calibrated on :func:`token_rows`."""
    loop = forward_loop_over(length_batches(token_rows(), batch_size))
    return quantize_model(fused, resolve(scheme_named(scheme), fused.wiring), loop, PROVENANCE)


def quantize_tiny(config: Any, scheme: str = "int8", kinds: Sequence[Kind] = ()) -> QuantizedModel:
    """From a config to the artifact."""
    return quantize_fused(fuse_tiny(make_tiny(config), kinds), scheme)


def relative_l2(actual: Tensor, reference: Tensor) -> float:
    """Distance of a tensor to a reference, over the length of the reference, in float64."""
    return float((actual.double() - reference.double()).norm() / reference.double().norm())
