"""Chunks of tokens in buffers that are used over and over.

An activation of a large model is tens of megabytes, and each update needs it in float32, centred
and multiplied. Were those temporaries allocated anew, between state that stays, the heap would fill
with holes and hold gigabytes that nobody uses (measured for the shape of Llama-2-7B: 1.7 GB for 0.7
GB of state). Here they are allocated once.

Shapes: G groups (1 for R1, the key/value heads for R2), T tokens, n channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Some tokens of an activation, about their mean.

    Attributes:
        centred: [G, T, n] float32, or float64 of float64 activations: the tokens less their mean.
            It lives in the workspace, and only until the next chunk.
        mean: [G, n] float64.
        squares: [G, n], the sum of ``centred`` squared.
        minimum: [G, n], of the tokens as they are.
        maximum: [G, n], of the tokens as they are.
    """

    centred: Tensor
    mean: Tensor
    squares: Tensor
    minimum: Tensor
    maximum: Tensor

    @property
    def count(self) -> int:
        """T, the number of tokens."""
        return self.centred.shape[1]


class Workspace:
    """Buffers by name, each as large as the largest request so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A tensor over the buffer ``name``, with whatever an earlier use has left in it."""
        size, key = math.prod(shape), (name, dtype, device)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers.pop(key, None)  # free before the larger one is allocated
            self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self._buffers[key][:size].view(*shape)

    def chunk(self, x: Tensor) -> Chunk:
        """Centre ``x`` [G, ..., n], whose middle dimensions are the T ≥ 1 tokens, of any floating
        dtype and strides.

        A float32 mean is off by 2⁻²⁴ of itself, which is much next to a small deviation. The
        deviations from that rounded mean are exact, or nearly, so *their* mean is the error, and is
        added back.
        """
        dtype = wide(x.dtype)
        tokens = (
            self.take("tokens", x.shape, dtype, x.device).copy_(x).view(x.shape[0], -1, x.shape[-1])
        )
        minimum, maximum = torch.aminmax(tokens, dim=1)
        rough = tokens.mean(dim=1)
        centred = tokens.sub_(rough.unsqueeze(1))
        squares = torch.square(
            centred, out=self.take("products", centred.shape, dtype, x.device)
        ).sum(dim=1)
        device = accumulator_device(x)
        mean = rough.to(device).double() + centred.mean(dim=1).to(device).double()
        return Chunk(centred, mean, squares, minimum, maximum)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of ``dtype`` are taken: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def accumulator_device(x: Tensor) -> torch.device:
    """Where float64 sums over ``x`` can live: its own device, or the CPU for one without float64
    (Apple's MPS).
    """
    return torch.device("cpu") if x.device.type == "mps" else x.device
