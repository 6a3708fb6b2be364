"""Linears that fake-quantize their input and their weight.

A linear becomes one of these by changing its class: its name, its parameters with their keys in the
state dict, and whatever hooks hang on it all stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.arithmetic.grids import weight_limits
from calib.errors import QuantizationError
from calib.fake_quant.fake_quantize import Role
from calib.fake_quant.qconfig import QConfig, TensorQConfig
from calib.modules.paths import is_conv1d
from calib.schemes import PerCluster, PerTensor, TensorScheme


class FakeQuantLinear(nn.Linear):
    """``nn.Linear`` with fake-quantizers, each an identity where none is wanted."""

    input_fake_quant: nn.Module
    weight_fake_quant: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """``Q(x) Q(W)^T + b``."""
        return functional.linear(
            self.input_fake_quant(input), self.weight_fake_quant(self.weight), self.bias
        )


def fake_quantize_linear(name: str, linear: Any, qconfig: QConfig) -> None:
    """Give a linear its fake-quantizers, in place.

    Args:
        name: of the linear, for messages.
        linear: a module for which :func:`is_linear` holds.
        qconfig: which.

    Raises:
        QuantizationError: the linear computes something of its own, has fake-quantizers already, or
            cannot be quantized as asked.
    """
    if hasattr(linear, "weight_fake_quant"):
        raise QuantizationError(
            f"'{name}' is prepared already", hint="Prepare a model once, from its float state."
        )
    conv1d = is_conv1d(linear)
    if not conv1d and type(linear).forward is not nn.Linear.forward:
        raise QuantizationError(
            f"'{name}' is a {type(linear).__name__} with a forward of its own",
            hint=(
                "Only nn.Linear and transformers' Conv1D can be prepared; leave it out of the"
                " modules."
            ),
        )
    weight = linear.weight.T if conv1d else linear.weight
    quantizers = {
        "input_fake_quant": _make(f"{name} (input)", "input", qconfig.activation, weight),
        "weight_fake_quant": _make(f"{name} (weight)", "weight", qconfig.weight, weight),
    }
    for key, quantizer in quantizers.items():
        linear.add_module(key, quantizer.to(weight.device))
    if conv1d:
        # here, because transformers takes seconds to import
        from calib.fake_quant.conv1d import FakeQuantConv1D

        linear.__class__ = FakeQuantConv1D
    else:
        linear.__class__ = FakeQuantLinear


def _make(name: str, role: Role, qconfig: TensorQConfig | None, weight: Tensor) -> nn.Module:
    """The fake-quantizer, with limits of the shape that the granularity gives them."""
    if qconfig is None:
        return nn.Identity()
    shape = (
        _input_shape(name, qconfig.scheme, weight)
        if role == "input"
        else _weight_shape(qconfig.scheme, weight)
    )
    return qconfig.make(name, role, shape)


def _weight_shape(scheme: TensorScheme, weight: Tensor) -> torch.Size:
    return weight_limits(weight, scheme.granularity)[0].shape


def _input_shape(name: str, scheme: TensorScheme, weight: Tensor) -> torch.Size:
    if scheme.dynamic or isinstance(scheme.granularity, PerTensor):
        return torch.Size([])
    if isinstance(scheme.granularity, PerCluster):
        return weight.shape[1:]
    raise QuantizationError(
        f"{name} cannot have static scales {scheme.granularity}",
        hint="use per tensor or cluster, or dynamic scales",
    )
