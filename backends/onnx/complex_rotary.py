"""Rotary embeddings that transformers computes in complex numbers, which ONNX has not.

    (x_0 + i x_1) (cos + i sin) = (x_0 cos - x_1 sin) + i (x_0 sin + x_1 cos)

for the pairs of neighbours ``x_0, x_1`` in a head. The model's rotary module gives cosines and
sines, and the function that applies them the products, both real, while a network is traced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calib.modules.lending import computing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FUNCTION = "apply_rotary_emb"
_HEADS = {"deepseek_v2": 1, "llama4_text": 2}
"""The axis of heads in what the function is given, by model type."""


@contextmanager
def real_rotary(network: PreTrainedModel) -> Iterator[None]:
    """Inside, ``network`` computes its rotary embeddings in real numbers."""
    heads = _HEADS.get(network.config.model_type)
    if heads is None:
        yield
        return
    modeling: Any = sys.modules[type(network).__module__]
    stock = getattr(modeling, _FUNCTION)
    with ExitStack() as lent:
        for name, module in network.named_modules():
            if name.endswith("rotary_emb"):
                lent.enter_context(computing(module, partial(_angles, module)))
        setattr(modeling, _FUNCTION, partial(_applied, heads))
        try:
            yield
        finally:
            setattr(modeling, _FUNCTION, stock)


def _angles(rotary: Any, x: Tensor, position_ids: Tensor) -> Tensor:
    """Cosines and sines of ``position_ids [B, S]``, ``[B, S, d / 2, 2]``."""
    angles: Tensor = position_ids[..., None].float() * rotary.inv_freq.float()
    return torch.stack([angles.cos(), angles.sin()], dim=-1) * float(rotary.attention_scaling)


def _applied(heads: int, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angles.unsqueeze(heads).unbind(-1)
    rotate: Callable[[Tensor], Tensor] = partial(_rotated, cos=cos, sin=sin)
    return rotate(query), rotate(key)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return pairs.flatten(-2).to(x)
