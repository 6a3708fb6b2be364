"""Calibrating the linears of one block: all at once on float inputs, or group by group behind
quantized ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from calib.layerwise.flow import Passage
from calib.layerwise.protocol import BlockQuantizer, Q
from calib.modules.lending import computing
from calib.network.observe_experts import experts_as_modules


def calibrate_at_once(
    calibrator: BlockQuantizer[Q], passage: Passage, groups: Sequence[Sequence[str]]
) -> dict[str, Q]:
    """Quantize every linear on its float inputs; the float outputs of the block go on.

    They are kept the first time that the calibrator runs the block: one that needs one pass costs
    one.
    """
    names = [name for group in groups for name in group]
    quantized = dict(calibrator.calibrate(passage.block, names, passage))
    passage.finish()
    return quantized


def calibrate_in_turn(
    calibrator: BlockQuantizer[Q],
    passage: Passage,
    groups: Sequence[Sequence[str]],
    *,
    w_quant: bool,
    a_quant: bool,
) -> dict[str, Q]:
    """Quantize group after group on what the quantized linears before it give it.

    The outputs of the block with every group quantized go on: weights if ``w_quant``, inputs if
    ``a_quant``.
    """
    quantized: dict[str, Q] = {}
    look = partial(passage, keep=False)
    with ExitStack() as replaced:
        for group in groups:
            local = [passage.block.local(name) for name in group]
            replaced.enter_context(experts_as_modules(passage.block.module, local))
            found = calibrator.calibrate(passage.block, group, look)
            for name, result in found.items():
                linear = passage.block.linear(name)
                function = calibrator.replacement(result, linear, w_quant, a_quant)
                replaced.enter_context(computing(linear, function))
            quantized |= found
        passage.finish()
    return quantized
