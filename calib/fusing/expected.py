"""The tensors that a transformers model has, without allocating any."""

from __future__ import annotations

from typing import Any

import torch

from calib.network.skeleton import build_on_meta


def expected_tensors(config: Any) -> dict[str, torch.Size]:
    """Name and shape of every tensor in the state dict of the model of ``config``, tied ones
    included.
    """
    return {name: tensor.shape for name, tensor in build_on_meta(config).state_dict().items()}
