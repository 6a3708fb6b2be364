"""Tiny bundles for TensorRT."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.base import WriteOptions
from backends.safetensors.bundle import write_bundle
from backends.safetensors.tensorrt.layout import TensorRTLayout
from calib.architectures import Kind
from calib.artifact import QuantizedCache, QuantizedModel
from calib.fusing import with_prefix
from calib.measure.reference import build_reference
from calib.schemes import KV_SCHEMES
from tests.tiny import CONFIGS, VOCABULARY, fuse_tiny, make_tiny, quantize_fused, wide_llama

TOKENS = 12


@lru_cache
def quantized(
    family: str,
    scheme: str,
    kinds: tuple[Kind, ...] = ("r1", "r2", "r4"),
    dtype: torch.dtype = torch.float32,
    prefix: tuple[int, ...] = (),
) -> QuantizedModel:
    config = wide_llama() if family == "wide" else CONFIGS[family]()
    fused = fuse_tiny(make_tiny(config), kinds, dtype, signs=5)
    return quantize_fused(with_prefix(fused, prefix), scheme)


def write(model: QuantizedModel, folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_bundle(model, TensorRTLayout(), folder, WriteOptions("tensorrt"))
    return folder


def with_cache(model: QuantizedModel) -> QuantizedModel:
    """``model`` with a quantized cache whose scales are told apart by layer and part."""
    scales = [{layer: torch.tensor(0.1 + layer + part) for layer in (0, 1)} for part in (0.0, 0.5)]
    return replace(model, cache=QuantizedCache(KV_SCHEMES["float8"], *scales))


def layer_values(
    model: QuantizedModel, layer: int, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What goes into and comes out of a decoder layer of the fake-quantized model, ``[T, D]`` each.

    With ``given``, this goes in.
    """
    network: Any = build_reference(model)
    seen: dict[str, Tensor] = {}

    def look(module: Any, args: tuple[Tensor, ...], output: Any) -> None:
        seen["x"] = args[0][0]
        seen["y"] = (output[0] if isinstance(output, tuple) else output).reshape(TOKENS, -1)

    if given is not None:
        network.model.layers[layer].register_forward_pre_hook(
            lambda module, args: (given[None], *args[1:])
        )
    network.model.layers[layer].register_forward_hook(look)
    network(torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(5)))
    return seen["x"], seen["y"]
