"""From a :class:`FusedModel` to a transformers model that runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from calib.fusing.expected import build_on_meta
from calib.fusing.fuser import FusedModel
from calib.online import attach_online


def materialize(fused: FusedModel, *, device: torch.device | str = "cpu") -> Any:
    """A ``PreTrainedModel`` in eval mode with the tensors of ``fused`` and its online rotations attached.

    The model is built on the meta device and takes the tensors as they are: on the CPU it shares their memory.
    """
    model: Any = build_on_meta(fused.config, fused.dtype)
    own = model.state_dict()
    for name, tensor in fused.state.items():
        if name not in own:  # a bias that a reader had to take from its norm
            module = model.get_submodule(name.rpartition(".")[0])
            module.register_parameter("bias", nn.Parameter(torch.empty_like(tensor, device="meta")))
    model.load_state_dict(fused.state, assign=True)
    _fill_buffers(model)
    if fused.architecture.experts is not None:
        # The grouped kernels have no float64, and ModelOpt sees experts through the two linears of the eager loop only.
        model.set_experts_implementation("eager")
    model.requires_grad_(False)
    model.to(device)
    model.eval()
    attach_online(model, fused.architecture, fused.config, fused.rotations)
    return model


@torch.no_grad()
def _fill_buffers(model: Any) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, embedding scales) their values.

    They cannot be computed on the meta device. transformers recomputes them after loading in ``_init_weights``, which
    leaves tensors alone that are marked as initialised; this does the same.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        for name in names:
            setattr(module, name, torch.empty_like(module._buffers[name], device="cpu"))
        if names:
            model._init_weights(module)
