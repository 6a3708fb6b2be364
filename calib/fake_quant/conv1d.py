"""GPT-2's linear, which stores its weight ``[in, out]``, with fake-quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class FakeQuantConv1D(Conv1D):  # type: ignore[misc]  # transformers is not type-checked here
    """transformers' ``Conv1D`` with fake-quantizers; its weight is quantized as the ``[out, in]``
    of other linears.
    """

    input_fake_quant: nn.Module
    weight_fake_quant: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``Q(x) Q(W) + b``, by the product that ``Conv1D`` takes, so that without rounding no bit
        changes.
        """
        x = self.input_fake_quant(x)
        weight = self.weight_fake_quant(self.weight.T).T
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], self.nf)
