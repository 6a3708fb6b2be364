"""The tensors that a transformers model has, without allocating any: the model is built on the meta device."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn


def build_on_meta(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal-LM module tree of ``config`` with every parameter and buffer on the meta device."""
    from transformers import AutoModelForCausalLM  # here, because it takes seconds to import

    with torch.device("meta"):
        # A copy, because from_config writes dtype and attention implementation into the config it is given.
        model: nn.Module = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype)
    return model


def expected_tensors(config: Any) -> dict[str, torch.Size]:
    """Name and shape of every tensor in the state dict of the model of ``config``, tied ones included."""
    return {name: tensor.shape for name, tensor in build_on_meta(config).state_dict().items()}
