"""From a :class:`FusedModel` to a transformers model that runs."""

from __future__ import annotations

from typing import Any

import torch

from calib.fusing.fuser import FusedModel
from calib.network.online import attach_online
from calib.network.skeleton import accept_biases, build_on_meta, fill_buffers


def materialize(fused: FusedModel, *, device: torch.device | str = "cpu") -> Any:
    """A ``PreTrainedModel`` in eval mode with the tensors of ``fused`` and its online rotations
    attached.

    The model is built on the meta device and takes the tensors as they are: on the CPU it shares
    their memory.
    """
    model = unloaded(fused)
    model.load_state_dict(fused.state, assign=True)
    return model.to(device)


def unloaded(fused: FusedModel) -> Any:
    """:func:`materialize` without the tensors: every parameter is on the meta device, to be loaded
    by assignment.

    Buffers that no checkpoint holds are real, on the CPU.
    """
    model = build_on_meta(fused.wiring.config, fused.dtype)
    accept_biases(model, fused.state)
    fill_buffers(model)
    if fused.wiring.architecture.experts is not None:
        # The grouped kernels have no float64.
        model.set_experts_implementation("eager")
    model.requires_grad_(False)
    model.eval()
    attach_online(model, fused.wiring, fused.rotations)
    return model
