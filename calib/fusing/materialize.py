"""From a :class:`FusedModel` to a transformers model that runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from calib.fusing.fuser import FusedModel
from calib.network.layout import StockTensors
from calib.network.online import attach_online
from calib.network.prefix import attach_prefix, compute_prefix
from calib.network.skeleton import accept_biases, build_on_meta, fill_buffers


def materialize(fused: FusedModel, *, device: torch.device | str = "cpu") -> Any:
    """A ``PreTrainedModel`` in eval mode with the tensors of ``fused`` and its online rotations
    attached.

    The model is built on the meta device and takes the tensors as they are: on the CPU it shares
    their memory.
    """
    model = unloaded(fused)
    model.load_state_dict(StockTensors(fused.state, fused.wiring), assign=True)
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
    if fused.prefix is not None:
        attach_prefix(model, fused.wiring, fused.prefix)
    return model


def with_prefix(
    fused: FusedModel, tokens: Sequence[int], reason: str = "", device: torch.device | str = "cpu"
) -> FusedModel:
    """``fused`` with ``tokens`` before every sequence; their keys and values are computed here, in
    its own rotated basis.

    Args:
        fused: the folded and rotated model. A prefix that it has is replaced.
        tokens: ids; none leave ``fused`` without a prefix.
        reason: recorded with them.
        device: where they are run.

    Raises:
        QuantizationError: as for :func:`~calib.network.prefix.compute_prefix`.
    """
    bare = replace(fused, prefix=None)
    if not tokens:
        return bare
    network = materialize(bare, device=device)
    return replace(bare, prefix=compute_prefix(network, fused.wiring, tokens, reason))
