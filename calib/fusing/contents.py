"""What reads the tensors of a checkpoint, and what is refused of it before any is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from calib.architectures import Wiring
from calib.fusing.converted import ConvertedTensors
from calib.fusing.source import SourceTensors
from calib.network.checkpoint import Checkpoint
from calib.network.contents import refuse_files, refuse_layers, refuse_quantized, refuse_unused
from calib.network.skeleton import expected_tensors


def check_contents(
    checkpoint: Checkpoint, wiring: Wiring, source: str, *, ignore_unused: bool = False
) -> None:
    """Refuse what no run should start from; nothing but headers is read.

    Args:
        checkpoint: the model's tensors.
        wiring: that of the model.
        source: what the model is called, for messages.
        ignore_unused: go on without the tensors that the config does not call for, and without an
            adapter that lies beside the weights.

    Raises:
        CheckpointError: the weights are quantized already, a tensor is missing, has another shape,
            or is not called for.
    """
    if checkpoint.folder is not None:
        quantized = checkpoint.quantization is not None
        refuse_files(checkpoint.folder, source, ignore_unused=ignore_unused, quantized=quantized)
        refuse_quantized(checkpoint.stored_dtypes(), source)
    refuse_layers(wiring.sizes.layers, len(checkpoint), source)
    tensors = source_tensors(checkpoint, wiring, expected_tensors(wiring.config))
    if not ignore_unused:
        refuse_unused(tensors.unused(), source)


def source_tensors(
    checkpoint: Mapping[str, Tensor], wiring: Wiring, expected: dict[str, torch.Size]
) -> SourceTensors:
    """What reads the tensors of a model; arguments and errors as for :class:`SourceTensors`."""
    if not wiring.generic:
        return SourceTensors(checkpoint, wiring, expected)
    return ConvertedTensors(checkpoint, wiring, expected)
