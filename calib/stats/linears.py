"""Moments of the inputs, outputs and weights of linears, each channel by itself.

They describe the model that they were taken from: after smoothing, rotating or anything else that
changes its numbers, take them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.architectures import LinearSpec
from calib.capture.workspace import Workspace, accumulator_device
from calib.data.batches import Batch
from calib.errors import QuantizationError
from calib.modules.paths import get_submodule, weight_of
from calib.process.progress import Progress, silent
from calib.stats.moments import MomentAccumulator, MomentStatistics, float64_chunks
from calib.stats.observe import observe


@dataclass(frozen=True)
class LinearMoments:
    """Moments of one linear ``y = x Wᵀ + b``.

    Attributes:
        input: of the channels of ``x``, [in], over all tokens.
        output: of the channels of ``y``, [out], over all tokens.
        weight_in: of the columns of ``W``, [in]: what each input channel is multiplied with.
        weight_out: of the rows of ``W``, [out]: what makes each output channel.
    """

    input: MomentStatistics
    output: MomentStatistics
    weight_in: MomentStatistics
    weight_out: MomentStatistics


def linear_moments(
    model: nn.Module,
    specs: Sequence[LinearSpec],
    batches: Sequence[Batch],
    *,
    progress: Progress = silent,
) -> dict[str, LinearMoments]:
    """Run ``batches`` through ``model`` and gather the moments of the linears of ``specs``, by
    name.

    Args:
        model: a Hugging Face causal LM.
        specs: which linears, and how they store their weights.
        batches: token rows; pad positions are left out.
        progress: called after each batch.

    Raises:
        DataError: there is no batch.
        UnsupportedModelError: a linear does not see one vector for each token.
        QuantizationError: a linear was never reached, or sees or makes NaN or Inf; the message
            names it.
    """
    inputs: dict[str, MomentAccumulator] = {}
    outputs: dict[str, MomentAccumulator] = {}
    workspace = Workspace()

    def see(name: str, x: Tensor, y: Tensor) -> None:
        for found, tokens in ((inputs, x), (outputs, y)):
            if name not in found:
                found[name] = MomentAccumulator(1, tokens.shape[-1], accumulator_device(tokens))
            for chunk in float64_chunks(tokens, workspace):
                found[name].update(chunk)

    observe(model, [spec.name for spec in specs], batches, see, stage="moments", progress=progress)
    moments = {}
    for spec in specs:
        weight = linear_weight(model, spec)
        moments[spec.name] = LinearMoments(
            input=_finite(f"the input of '{spec.name}'", inputs[spec.name].result().group(0)),
            output=_finite(f"the output of '{spec.name}'", outputs[spec.name].result().group(0)),
            weight_in=_finite(f"the weight of '{spec.name}'", matrix_moments(weight)),
            weight_out=matrix_moments(weight.T),
        )
    return moments


def matrix_moments(matrix: Tensor) -> MomentStatistics:
    """Moments of the columns of ``matrix`` [rows, columns], of any floating dtype: [columns]."""
    accumulator = MomentAccumulator(1, matrix.shape[1], accumulator_device(matrix))
    for chunk in float64_chunks(matrix.detach(), Workspace()):
        accumulator.update(chunk)
    return accumulator.result().group(0)


def linear_weight(model: nn.Module, spec: LinearSpec) -> Tensor:
    """The weight of a linear as ``[out, in]``, however it is stored: a view."""
    return weight_of(get_submodule(model, spec.name)).detach()


def _finite(what: str, moments: MomentStatistics) -> MomentStatistics:
    # The least and the greatest value pass NaN and Inf on.
    if not bool(torch.isfinite(moments.minimum).all() and torch.isfinite(moments.maximum).all()):
        raise QuantizationError(
            f"{what} holds NaN or Inf",
            hint=(
                "check the checkpoint's weights; a model that overflows needs --dtype bfloat16 or"
                " float32"
            ),
        )
    return moments
