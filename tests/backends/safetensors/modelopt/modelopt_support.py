"""Tiny models that ModelOpt exports, and rotq's artifacts of the same tensors calibrated on the
same rows.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from backends.safetensors.modelopt.layout import ModelOptLayout
from calib.artifact import QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.fusing import FusedModel, materialize
from calib.modelopt.config import config_of
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import customised, resolve
from calib.schemes import INT4, LinearScheme, scheme_named
from tests.tiny import GPT2, MOE, PROVENANCE, SIZES, fuse_tiny, make_tiny, token_rows

TARGET = "modelopt"
_WIDE = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_WIDE, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(**_WIDE, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(**GPT2 | {"n_embd": 64}),
    "phi3": lambda: transformers.Phi3Config(**_WIDE),
    "mixtral": lambda: transformers.MixtralConfig(
        **_WIDE, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_WIDE,
        **MOE | {"decoder_sparse_step": 2, "moe_intermediate_size": 32},
        shared_expert_intermediate_size=64,
    ),
}
"""Widths are multiples of 32, as blocks have it."""
BLOCK = 16
"""Of INT4 weights: several to a row."""
_CACHE = [
    {
        "quantizer_name": f"*{part}_bmm_quantizer",
        "cfg": {"num_bits": (4, 3), "axis": None},
        "enable": True,
    }
    for part in "kv"
]


@dataclass(frozen=True)
class Calibrated:
    """One fused model, and rotq's artifact of it."""

    fused: FusedModel
    artifact: QuantizedModel


def calibrated(
    family: str,
    scheme: str,
    *,
    dtype: torch.dtype = torch.float32,
    kv: str | None = None,
    overrides: Mapping[str, str] | None = None,
    weights: str = "rtn",
    **controls: Any,
) -> Calibrated:
    """A tiny model of ``family``, quantized."""
    fused = fuse_tiny(make_tiny(CONFIGS[family]()), (), dtype)
    found = scheme_named(scheme)
    if found.weight is not None and found.weight.format == INT4 and "block_size" not in controls:
        controls["block_size"] = BLOCK
    wanted = resolve(
        customised(found, **controls),
        fused.wiring,
        overrides=overrides,
        kv=kv,
        weights=weights,
    )
    return Calibrated(fused, quantize_model(fused, wanted, _loop(), PROVENANCE))


@dataclass(frozen=True)
class Exported:
    """What ``export_hf_checkpoint`` wrote."""

    tensors: dict[str, Tensor]
    quant_config: dict[str, Any]
    config: dict[str, Any]


def exported(model: Calibrated, folder: Path, config: Mapping[str, Any] | None = None) -> Exported:
    """``model`` quantized, calibrated and exported by ModelOpt alone.

    Args:
        model: gives the tensors, and what is quantized and how.
        folder: empty.
        config: of ModelOpt, where it is not that of the artifact's linears one by one.
    """
    network: Any = materialize(model.fused)
    network.config.architectures = [type(network).__name__]  # the export fails without
    wanted = dict(config or _config(model.artifact))
    if model.artifact.cache is not None:
        wanted["quant_cfg"] = [*wanted["quant_cfg"], *_CACHE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ModelOpt's own
        with torch.no_grad():
            network = mtq.quantize(network, wanted, _loop())
        export_hf_checkpoint(network, export_dir=folder)
    return Exported(
        load_file(folder / "model.safetensors"),
        json.loads((folder / "hf_quant_config.json").read_text(encoding="utf-8")),
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"],
    )


def preset(name: str, *disabled: str) -> dict[str, Any]:
    """One of ModelOpt's own configurations, without the quantizers ``disabled``."""
    config = copy.deepcopy(getattr(mtq, name))
    config["quant_cfg"] = [
        *config["quant_cfg"],
        *({"quantizer_name": each, "enable": False} for each in disabled),
    ]
    found: dict[str, Any] = config
    return found


def _config(model: QuantizedModel) -> dict[str, Any]:
    schemes = model.schemes()
    config = config_of(schemes)
    for name, scheme in schemes.items():
        if _is_w4a8(scheme):  # ModelOpt rounds these weights twice, to INT4 and to FP8
            entry = next(
                e for e in config["quant_cfg"] if e["quantizer_name"] == f"{name}.weight_quantizer"
            )
            entry["cfg"] = [entry["cfg"], {"num_bits": (4, 3)}]
    return config


def _is_w4a8(scheme: LinearScheme) -> bool:
    return scheme.weight.format == INT4 and scheme.input is not None


def _loop() -> Any:
    return forward_loop_over(length_batches(token_rows(), 4))


def tensors_of(model: QuantizedModel) -> dict[str, Tensor]:
    """The tensors of the bundle by key, as they are described."""
    found = {}
    for entry in ModelOptLayout().entries(model):
        tensor = entry.read()
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.key
        assert tensor.is_contiguous(), entry.key
        assert entry.key not in found
        found[entry.key] = tensor
    return found


def files_of(model: QuantizedModel) -> dict[str, Any]:
    """The text files of the bundle, read as JSON."""
    return {name: json.loads(text) for name, text in ModelOptLayout().files(model).items()}


def different(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], keys: Sequence[str]
) -> list[str]:
    """Those of ``keys`` whose tensors differ in dtype, shape or a byte."""

    def content(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist()

    return [key for key in keys if content(one[key]) != content(other[key])]
