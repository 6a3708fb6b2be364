"""The walk: hidden states of all batches flow through block after block of a lazily fused model.

A block is loaded, everybody who wants to looks at it while the batches pass, and it is freed. What
comes out of the last one is normed as the model does it, and goes through the output head a few
tokens at a time. So memory holds one block, and hidden states ``[tokens, hidden]``; never logits
``[tokens, vocabulary]`` of all tokens.

    flow = Flow(fused, batches, folder)
    flow.enter()
    for passage in flow.blocks():
        with watching(passage.block.module, inputs=...):
            passage()

The numbers are those of the whole model, to the bit: the same batches pass the same modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.data.batches import Batch
from calib.errors import DataError
from calib.fusing import FusedModel, unloaded
from calib.layerwise.activations import Activations
from calib.layerwise.blocks import Block, outside_blocks
from calib.layerwise.calls import BlockCall, apply_head, enter, leave
from calib.layerwise.modules import loaded
from calib.network.layout import StockTensors

DEFAULT_MAX_MEMORY = 2 << 30
"""Bytes of hidden states that are held in memory by default."""


@dataclass
class Passage:
    """One block with its weights in memory, and the batches that pass through it."""

    block: Block
    batches: Sequence[Batch]
    inputs: Activations
    calls: Sequence[BlockCall]
    """How the block is called, by batch."""
    device: torch.device
    outputs: Activations | None
    """What comes out of the block; ``None``: nobody needs it."""

    @torch.no_grad()
    def __call__(
        self,
        module: nn.Module | None = None,
        *,
        begin: Callable[[Batch], None] | None = None,
        keep: bool = True,
    ) -> None:
        """Run every batch through the block.

        Args:
            module: runs in its place: a copy, perhaps.
            begin: called before each batch.
            keep: what the block itself computes goes on to the next one, unless an earlier run's
                does already.
        """
        running = self.block.module if module is None else module
        keeps = keep and running is self.block.module and self._missing
        for index, batch in enumerate(self.batches):
            if begin is not None:
                begin(batch)
            output = self.calls[index](running, self.inputs[index], self.device)
            if keeps and self.outputs is not None:
                self.outputs.append(output)

    def finish(self) -> None:
        """Run the block once more if what goes on is still to be computed."""
        if self._missing:
            self()

    @property
    def _missing(self) -> bool:
        return self.outputs is not None and len(self.outputs) < len(self.batches)


class Flow:
    """The hidden states of some batches, on their way through a model of which one block at a time
    is in memory.
    """

    def __init__(
        self,
        fused: FusedModel,
        batches: Sequence[Batch],
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        max_memory: int = DEFAULT_MAX_MEMORY,
        persist: bool = False,
        to_the_end: bool = False,
    ) -> None:
        """
        Args:
            fused: the folded and rotated model, from ``fuse(lazy=True)``; the blocks would share
                the tensors of one that is held in memory.
            batches: tokens without padding.
            folder: for hidden states that do not fit.
            device: where blocks run.
            max_memory: bytes of hidden states that are held in memory; what exceeds them goes to
                disk.
            persist: write all hidden states to disk.
            to_the_end: keep what the last block computes, for :meth:`final`.

        Raises:
            DataError: a batch has padding.
        """
        if any(batch.attention_mask is not None for batch in batches):
            raise DataError(
                "layer-wise calibration takes batches without padding",
                hint="batch rows of equal length together",
            )
        self.model: Any = unloaded(fused)
        """Its module tree, on the meta device but for what is loaded."""
        self.layers = fused.wiring.sizes.layers
        self.batches = list(batches)
        self.to_the_end = to_the_end
        self._wiring = fused.wiring
        self._state = fused.state
        self._stock = StockTensors(fused.state, fused.wiring)
        self._folder = folder
        self.device = torch.device(device)
        self._max_memory = max_memory // 2  # for the inputs of a block, and as much for its outputs
        self._persist = persist
        self._calls: dict[torch.Size, list[BlockCall]] = {}
        self._hidden: Activations | None = None

    @property
    def outside(self) -> list[str]:
        """Names of the tensors in no block."""
        return outside_blocks(list(self._state), self._wiring)

    def folder(self, index: int) -> Path:
        """Where the hidden states that enter block ``index`` are kept."""
        return self._folder / f"hidden-{index:05d}"

    def enter(self, start: int = 0, existing: Mapping[str, str] | None = None) -> None:
        """Take in what enters block ``start``, and how the model calls each block.

        Args:
            start: the first block to be passed; after the last one, their number.
            existing: :attr:`Activations.digests` of what enters ``start``, kept by an earlier walk.

        Raises:
            CheckpointError: hidden states of an earlier walk are missing or damaged.
        """
        self._hidden = self._activations(start, existing)
        blocks = self._blocks()
        if not self.batches:
            return
        with loaded(self.model, self._stock, self._around(tokens=True)):
            for batch in self.batches:
                if existing is not None and batch.input_ids.shape in self._calls:
                    continue
                hidden, self._calls[batch.input_ids.shape] = enter(self.model, blocks, batch)
                if existing is None:
                    self._hidden.append(hidden)

    def blocks(self) -> Iterator[Passage]:
        """Every block in turn, in memory until the next one is asked for."""
        for index in range(self.layers):
            with self.through(index) as passage:
                yield passage

    @contextmanager
    def through(self, index: int) -> Iterator[Passage]:
        """The block ``index``, whose inputs are at hand, in memory inside. After it, its outputs
        are.
        """
        hidden = self._at_hand()
        name = self._wiring.block(index)
        last = index + 1 == self.layers
        outputs = None if last and not self.to_the_end else self._activations(index + 1)
        with loaded(self.model, self._stock, self.tensors_of(index)):
            block = Block(index, name, self.model.get_submodule(name).to(self.device))
            calls = [self._calls[batch.input_ids.shape][index] for batch in self.batches]
            passage = Passage(block, self.batches, hidden, calls, self.device, outputs)
            yield passage
            passage.finish()
        hidden.delete()
        self._hidden = outputs

    def tensors_of(self, index: int) -> list[str]:
        """Names of the tensors of the block ``index``."""
        return [key for key in self._state if key.startswith(f"{self._wiring.block(index)}.")]

    @torch.no_grad()
    def final(self) -> Iterator[Tensor]:
        """What enters the output head, ``[rows, length, hidden]`` of every batch; asked for behind
        the last block, as often as it is needed.
        """
        blocks, hidden = self._blocks(), self._at_hand()
        with loaded(self.model, self._stock, self._around(tokens=False)):
            for index in range(len(self.batches)):
                yield leave(self.model, blocks, hidden[index])

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The output head, in memory inside: from hidden states ``[tokens, hidden]`` of
        :meth:`final` to logits ``[tokens, vocabulary]``, scaled and capped as the model does it.
        """
        name = self._wiring.head.name
        names = [key for key in self._state if key.startswith(f"{name}.")]
        with loaded(self.model, self._stock, names):
            self.model.get_submodule(name).to(self.device)
            yield lambda hidden: apply_head(self.model, hidden.to(self.device))

    def delete(self) -> None:
        """Free the memory of hidden states, and remove their files."""
        if self._hidden is not None:
            self._hidden.delete()

    def _at_hand(self) -> Activations:
        assert self._hidden is not None  # enter() comes first
        return self._hidden

    def _blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(self._wiring.block(i)) for i in range(self.layers)]

    def _around(self, *, tokens: bool) -> list[str]:
        """Names of the tensors in no block, without the head, with or without the tokens'
        embedding.
        """
        left_out = [self._wiring.head.name, *([] if tokens else [self._wiring.embeddings[0].name])]
        prefixes = tuple(f"{name}." for name in left_out)
        return [name for name in self.outside if not name.startswith(prefixes)]

    def _activations(self, index: int, existing: Mapping[str, str] | None = None) -> Activations:
        """The hidden states that enter block ``index``."""
        return Activations(
            self.folder(index), self._max_memory, persist=self._persist, existing=existing
        )
