"""A small model for the tests of fake quantization."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two linears with a nonlinearity between them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(6, 10)
            self.second = nn.Linear(10, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def batches(count: int = 3, seed: int = 0) -> list[Tensor]:
    """Random inputs ``[8, 6]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 6, generator=generator) for _ in range(count)]
