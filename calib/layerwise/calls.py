"""How a model calls its decoder blocks: the hidden states that enter the first, what else each one
is given, and what becomes of the last one's.

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
from calib.layerwise.modules import on_device
from calib.modules.lending import computing

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


@torch.no_grad()
def leave(model: PreTrainedModel, blocks: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """What the output head reads where the last block gives ``hidden``, both ``[rows, length,
    hidden]``.

    Args:
        model: a causal LM of which everything but the blocks, the tokens' embedding and the output
            head is loaded.
        blocks: its decoder blocks, in order.
        hidden: the output of the last one.
    """

    def give(entering: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden.to(entering.device)

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(computing(block, give))
        # what enters does not matter, and needs no table of tokens
        output = model.base_model(inputs_embeds=torch.zeros_like(hidden), use_cache=False)
    final: Tensor = output.last_hidden_state
    return final


@dataclass(frozen=True)
class _DecoderOutput:
    """What every causal LM reads of its decoder's output, whatever else its class may hold (router
    logits, cross attentions).
    """

    last_hidden_state: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def apply_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of what the output head reads, ``[tokens, hidden]``, and what
    the model does to them.

    Args:
        model: a causal LM of which the output head is loaded.
        hidden: of :func:`leave`.
    """
    decoder: Any = model.get_decoder()
    output = _DecoderOutput(hidden.unsqueeze(0))
    ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
    with computing(decoder, lambda *_, **__: output):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0]
