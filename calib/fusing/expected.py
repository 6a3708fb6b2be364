"""The tensors that a transformers model has, and their shapes, without allocating any."""

from __future__ import annotations

from typing import Any

import torch

from calib.architectures import Architecture
from calib.network.skeleton import build_on_meta


def expected_tensors(config: Any) -> dict[str, torch.Size]:
    """Name and shape of every tensor in the state dict of the model of ``config``, tied ones
    included.
    """
    return {name: tensor.shape for name, tensor in build_on_meta(config).state_dict().items()}


def oriented_shapes(architecture: Architecture, config: Any) -> dict[str, tuple[int, ...]]:
    """:func:`expected_tensors` with the weights of linears ``[out, in]``, as
    :class:`~calib.fusing.FusedModel` has them.
    """
    turned = architecture.turned_weights(config)
    return {
        name: tuple(reversed(shape)) if name in turned else tuple(shape)
        for name, shape in expected_tensors(config).items()
    }
