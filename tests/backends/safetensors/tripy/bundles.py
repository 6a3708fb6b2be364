"""Tiny bundles for Tripy, and what they are compared with."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.base import WriteOptions
from backends.safetensors.bundle import write_bundle
from backends.safetensors.tripy.layout import TripyLayout
from calib.architectures import Kind
from calib.artifact import QuantizedModel
from calib.fusing import with_prefix
from calib.measure.reference import build_reference
from tests.tiny import CONFIGS, VOCABULARY, fuse_tiny, make_tiny, quantize_fused


@lru_cache
def quantized(
    family: str,
    scheme: str,
    kinds: tuple[Kind, ...] = ("r1", "r2", "r4"),
    dtype: torch.dtype = torch.float32,
    prefix: tuple[int, ...] = (),
) -> QuantizedModel:
    fused = fuse_tiny(make_tiny(CONFIGS[family]()), kinds, dtype, signs=5)
    return quantize_fused(with_prefix(fused, prefix), scheme)


def write(model: QuantizedModel, folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_bundle(model, TripyLayout(), folder, WriteOptions("tripy"))
    return folder


def token_ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def reference_logits(model: QuantizedModel, ids: Tensor) -> Tensor:
    network: Any = build_reference(model)
    logits: Tensor = network(ids).logits
    return logits
