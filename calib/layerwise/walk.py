"""Calibrating the linears of one block: all at once on float inputs, or group by group behind
quantized ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from calib.layerwise.activations import Activations
from calib.layerwise.blocks import Block
from calib.layerwise.calls import BlockCall
from calib.layerwise.modules import computing
from calib.layerwise.protocol import BlockQuantizer, Q
from calib.network.observe_experts import experts_as_modules


@dataclass(frozen=True)
class Replay:
    """Runs the calibration batches through one block."""

    block: Block
    inputs: Activations
    calls: Sequence[BlockCall]
    """How the block is called, by batch."""
    device: torch.device

    @torch.no_grad()
    def __call__(
        self, module: nn.Module | None = None, *, outputs: Activations | None = None
    ) -> None:
        """Run ``module`` (by default the block), and keep what it computes in ``outputs``, if
        given.
        """
        running = self.block.module if module is None else module
        for batch, call in enumerate(self.calls):
            output = call(running, self.inputs[batch], self.device)
            if outputs is not None:
                outputs.append(output)


def calibrate_at_once(
    calibrator: BlockQuantizer[Q],
    replay: Replay,
    groups: Sequence[Sequence[str]],
    outputs: Activations | None,
) -> dict[str, Q]:
    """Quantize every linear on its float inputs; ``outputs`` takes the float outputs of the block.

    They are kept the first time that the calibrator runs the block: one that needs one pass costs
    one.
    """
    missing = outputs is not None  # outputs are still to be computed

    def run(module: nn.Module | None = None) -> None:
        nonlocal missing
        keep = missing and (module is None or module is replay.block.module)
        replay(module, outputs=outputs if keep else None)
        missing = missing and not keep

    quantized = calibrator.calibrate(
        replay.block, [name for group in groups for name in group], run
    )
    if missing:
        replay(outputs=outputs)
    return dict(quantized)


def calibrate_in_turn(
    calibrator: BlockQuantizer[Q],
    replay: Replay,
    groups: Sequence[Sequence[str]],
    outputs: Activations | None,
    *,
    w_quant: bool,
    a_quant: bool,
) -> dict[str, Q]:
    """Quantize group after group on what the quantized linears before it give it.

    ``outputs`` takes those of the block with every group quantized: weights if ``w_quant``, inputs
    if ``a_quant``.
    """
    quantized: dict[str, Q] = {}
    with ExitStack() as replaced:
        for group in groups:
            local = [replay.block.local(name) for name in group]
            replaced.enter_context(experts_as_modules(replay.block.module, local))
            found = calibrator.calibrate(replay.block, group, replay)
            for name, result in found.items():
                linear = replay.block.linear(name)
                function = calibrator.replacement(result, linear, w_quant, a_quant)
                replaced.enter_context(computing(linear, function))
            quantized |= found
        if outputs is not None:
            replay(outputs=outputs)
    return quantized
