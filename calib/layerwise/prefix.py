"""The keys and values of a prefix in one walk, with one block in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from calib.artifact.prefix import Prefix
from calib.data.batches import Batch
from calib.fusing import FusedModel
from calib.layerwise.flow import Flow
from calib.modules.watch import watching
from calib.network.prefix import check_tokens


def with_prefix_blockwise(
    fused: FusedModel, tokens: Sequence[int], reason: str = "", device: torch.device | str = "cpu"
) -> FusedModel:
    """:func:`calib.fusing.with_prefix` of a model whose tensors are computed on access; the same
    keys and values, arguments and errors.
    """
    bare = replace(fused, prefix=None)
    if not tokens:
        return bare
    check_tokens(fused.wiring, tokens)
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def look(layer: int, key: Tensor, value: Tensor) -> None:
        keys[layer], values[layer] = (part[0].detach().cpu().clone() for part in (key, value))

    row = Batch(torch.tensor([list(tokens)]), (0,))
    # a few tokens never leave memory: nothing is written to the folder
    with tempfile.TemporaryDirectory(prefix="rotq-") as folder:
        flow = Flow(bare, [row], Path(folder), device=device)
        flow.enter()
        for passage in flow.blocks():
            block = passage.block
            attention = block.local(fused.wiring.attention(block.index))
            with watching(block.module, caches={attention: partial(look, block.index)}):
                passage()
    return replace(bare, prefix=Prefix(tuple(int(token) for token in tokens), keys, values, reason))
