"""How a model calls its decoder blocks: the hidden states that enter the first, and what else each
one is given.

Masks and position embeddings depend on the block (sliding windows, layers without RoPE) and on the
shape of the batch, but not on its tokens, as batches have no padding. So they are recorded once per
shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calib.data.batches import Batch
from calib.layerwise.modules import computing, on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor, device: torch.device | str) -> Tensor:
        """The output of ``block`` for ``hidden``, both ``[rows, length, hidden]``, on
        ``device``.
        """
        args, kwargs = on_device(self.args, device), on_device(self.kwargs, device)
        output: Tensor = block(hidden.to(device), *args, **kwargs)
        return output


@torch.no_grad()
def enter(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batch: Batch
) -> tuple[Tensor, list[BlockCall]]:
    """Run ``model`` on the CPU with blocks that pass their input through.

    Args:
        model: a causal LM of which everything but the blocks and the output head is loaded.
        blocks: its decoder blocks, in order.
        batch: tokens ``[rows, length]``, without padding.

    Returns:
        The hidden states that enter block 0, ``[rows, length, hidden]``, and how each block is
        called.
    """
    entering: list[Tensor] = []
    calls: list[BlockCall] = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entering.append(hidden)
        calls.append(BlockCall(args, kwargs))
        return hidden

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(computing(block, record))
        model.base_model(**batch.model_inputs("cpu"), use_cache=False)
    return entering[0], calls
