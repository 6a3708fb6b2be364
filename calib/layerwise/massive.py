"""Massive tokens found in one walk, with one block in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from calib.data.batches import Batch
from calib.fusing import FusedModel
from calib.layerwise.flow import Flow
from calib.layerwise.prefix import with_prefix_blockwise
from calib.modules.watch import watching
from calib.stats.massive import Magnitudes, MassiveInput


def massive_inputs_blockwise(
    fused: FusedModel,
    tokens: Sequence[int],
    rows: Sequence[Tensor],
    *,
    device: torch.device | str = "cpu",
) -> list[MassiveInput]:
    """:func:`calib.stats.massive.massive_inputs` of ``fused`` behind a prefix of ``tokens``.

    Args:
        fused: the folded model, its tensors computed on access.
        tokens: ids of the prefix; none: without one.
        rows: token rows, int64 ``[tokens]``.
        device: where blocks run.
    """
    names = fused.wiring.linear_names
    magnitudes = Magnitudes(names)
    batches = [Batch(row.unsqueeze(0), (index,)) for index, row in enumerate(rows)]
    with tempfile.TemporaryDirectory(prefix="rotq-") as folder:
        flow = Flow(
            with_prefix_blockwise(fused, tokens, device=device),
            batches,
            Path(folder),
            device=device,
        )
        flow.enter()
        for passage in flow.blocks():
            block = passage.block
            looks = {
                block.local(name): partial(magnitudes.look, name)
                for name in names
                if name.startswith(f"{block.name}.")
            }
            with watching(block.module, inputs=looks):
                passage()
    return magnitudes.ranked(rows)
