"""Fixtures of the capture tests."""

from __future__ import annotations

import pytest
import torch
from capture_support import LAYERS, VOCABULARY, build_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from calib.capture.sites import CaptureSite


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return build_llama()


@pytest.fixture
def sites() -> list[CaptureSite]:
    found = []
    for layer in range(LAYERS):
        found += [
            CaptureSite(f"model.layers.{layer}.self_attn.q_proj", layer, "r1"),
            CaptureSite(f"model.layers.{layer}.mlp.up_proj", layer, "r1"),
            CaptureSite(f"model.layers.{layer}.self_attn.o_proj", layer, "r2"),
        ]
    return found


@pytest.fixture
def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = [9, 12, 5, 9, 9, 12, 7, 9, 5, 12]
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]
