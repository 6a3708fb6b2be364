"""The walk: one decoder block after the other is loaded, calibrated, written and freed.

Without ``asym`` every linear is calibrated on what it reads in the float model: a block is run once
for all of its linears, and its float outputs enter the next block. With ``asym`` a linear is
calibrated on what it will read in the quantized model, of which everything before it is finished:
the groups of linears of a block follow each other, each observed behind the quantized ones before
it, and the outputs of the quantized block enter the next.

Source: the calibration runner of Sparsebit (Megvii), after whose methods these are called. It keeps
float and quantized outputs of every node; here one set of hidden states lives between blocks.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from calib.architectures.groups import reading_groups
from calib.data.batches import Batch
from calib.errors import CheckpointError, DataError
from calib.fusing import FusedModel, unloaded
from calib.layerwise.activations import Activations
from calib.layerwise.blocks import Block, outside_blocks
from calib.layerwise.calls import BlockCall, enter
from calib.layerwise.modules import loaded
from calib.layerwise.protocol import BlockQuantizer, Q
from calib.layerwise.shards import ShardStore
from calib.layerwise.walk import Replay, calibrate_at_once, calibrate_in_turn
from calib.network.layout import StockTensors, oriented
from calib.progress import Progress, silent, track

DEFAULT_MAX_MEMORY = 2 << 30
"""Bytes of hidden states that are held in memory by default."""


class CalibrationRunner(Generic[Q]):
    """Calibrates and quantizes a model whose tensors are computed block by block, and never whole
    in memory.

    Attributes:
        shards: what is finished; after :meth:`layerwise_calibration` every tensor of the quantized
            model.
    """

    def __init__(
        self,
        fused: FusedModel,
        batches: Sequence[Batch],
        calibrator: BlockQuantizer[Q],
        work: Path,
        *,
        max_memory: int = DEFAULT_MAX_MEMORY,
        resume: bool = False,
        resumable: bool = True,
        settings: Mapping[str, str] | None = None,
        progress: Progress = silent,
    ) -> None:
        """
        Args:
            fused: the folded and rotated model, from ``fuse(lazy=True)``; the blocks would share
                the tensors of one that is held in memory.
            batches: calibration tokens without padding. With none nothing is run, which is all that
                rounding weights to nearest needs.
            calibrator: quantizes the linears.
            work: folder for shards and hidden states.
            max_memory: bytes of hidden states that are held in memory; what exceeds them goes to
                disk.
            resume: go on with the walk that ``work`` holds, at the block that it was in.
            resumable: write all hidden states to disk, so that a later walk can go on.
            settings: what the result depends on beside the batches and the dtype (model, recipe): a
                resumed walk must have the same.
            progress: called after every block.

        Raises:
            DataError: a batch has padding, which would enter the statistics.
            OutputError: ``work`` holds a walk and ``resume`` is not given.
            CheckpointError: what is to be resumed is damaged.
        """
        if any(batch.attention_mask is not None for batch in batches):
            raise DataError(
                "layer-wise calibration takes batches without padding",
                hint="batch rows of equal length together",
            )

        self._fused = fused
        self._batches = list(batches)
        self._calibrator = calibrator
        self._work = work
        self._max_memory = max_memory // 2  # for the inputs of a block, and as much for its outputs
        self._resumable = resumable
        self._settings = {
            "batches": _fingerprint(self._batches),
            "dtype": str(fused.dtype),
            **(settings or {}),
        }
        self._progress = progress
        self._layers = fused.wiring.sizes.layers
        self._model: Any = unloaded(fused)
        self._stock = StockTensors(fused.state, fused.wiring)
        self._calls: dict[torch.Size, list[BlockCall]] = {}
        self._inputs: Activations | None = None
        self.shards = ShardStore(work, resume=resume)

    def prepare_calibration(self) -> None:
        """Collect what enters the first block that is not finished, and how the model calls each
        block.

        Raises:
            CheckpointError: the hidden states to go on with are missing or damaged.
        """
        start = self._first_unfinished()
        for folder in self._work.glob("hidden-*"):
            if folder != self._hidden(start):
                shutil.rmtree(folder)
        existing = self.shards.next_inputs(_shard(start - 1)) if 0 < start < self._layers else None
        if existing is not None and len(existing) != len(self._batches):
            raise CheckpointError(
                f"'{self._work}' keeps no hidden states to go on from",
                hint="start again in another --work-dir",
            )
        self._inputs = self._activations(start, existing)
        if start < self._layers:
            self._collect(self._inputs, have=existing is not None)

    def layerwise_calibration(
        self,
        device: torch.device | str = "cpu",
        asym: bool = False,
        w_quant: bool = False,
        a_quant: bool = False,
    ) -> None:
        """Walk the blocks, then write what lies outside them.

        Args:
            device: where blocks run.
            asym: feed each linear the outputs of the already quantized ones.
            w_quant: with ``asym``, whether their weights are rounded.
            a_quant: with ``asym``, whether their inputs are rounded.

        Raises:
            OutputError: a resumed walk was started with other settings.
            CheckpointError: a tensor of the checkpoint holds NaN or Inf, or overflows float16.
        """
        if self._inputs is None:
            self.prepare_calibration()
        flags = {"asym": asym, "w_quant": w_quant, "a_quant": a_quant}
        self.shards.bind(
            self._settings | {name: str(value).lower() for name, value in flags.items()}
        )
        for index in track(range(self._layers), "calibrate", self._layers, self._progress):
            if _shard(index) not in self.shards.finished():
                self._finish_block(index, torch.device(device), **flags)
        self._finish_outside()

    def _collect(self, inputs: Activations, *, have: bool) -> None:
        """Record the calls of every shape of batch and, unless we ``have`` them, fill
        ``inputs``.
        """
        blocks = [self._model.get_submodule(self._name(index)) for index in range(self._layers)]
        head = f"{self._fused.wiring.head.name}."
        names = [name for name in self._outside() if not name.startswith(head)]
        with loaded(self._model, self._stock, names):
            for batch in self._batches:
                if have and batch.input_ids.shape in self._calls:
                    continue
                hidden, self._calls[batch.input_ids.shape] = enter(self._model, blocks, batch)
                if not have:
                    inputs.append(hidden)

    def _finish_block(
        self, index: int, device: torch.device, *, asym: bool, w_quant: bool, a_quant: bool
    ) -> None:
        assert self._inputs is not None  # layerwise_calibration prepares
        name = self._name(index)
        own = [key for key in self._fused.state if key.startswith(f"{name}.")]
        groups = reading_groups(self._fused.wiring, index)
        outputs = self._activations(index + 1) if index + 1 < self._layers else None

        with loaded(self._model, self._stock, own):
            block = Block(index, name, self._model.get_submodule(name).to(device))
            calls = [self._calls[batch.input_ids.shape][index] for batch in self._batches]
            replay = Replay(block, self._inputs, calls, device)
            quantized = (
                calibrate_in_turn(
                    self._calibrator, replay, groups, outputs, w_quant=w_quant, a_quant=a_quant
                )
                if asym
                else calibrate_at_once(self._calibrator, replay, groups, outputs)
            )
            kept = outputs.digests if outputs is not None and self._resumable else {}
            self.shards.write(_shard(index), self._tensors(block, own, quantized), next_inputs=kept)
        self._inputs.delete()
        self._inputs = outputs

    def _tensors(
        self, block: Block, own: Sequence[str], quantized: Mapping[str, Q]
    ) -> dict[str, Tensor]:
        """What is stored of a block: its float tensors as the calibrator has left them, and the
        quantized linears.
        """
        state = oriented(
            block.module.state_dict(prefix=f"{block.name}."),
            self._fused.wiring,
        )
        replaced = {f"{name}.{part}" for name in quantized for part in ("weight", "bias")}
        # the 3-D parameter that an expert belongs to
        replaced |= {name.rpartition(".")[0] for name in quantized}
        tensors = {key: state[key].cpu() for key in own if key not in replaced}
        for name, result in quantized.items():
            tensors |= {
                f"{name}.{part}": tensor.cpu()
                for part, tensor in self._calibrator.tensors(result).items()
            }
        return tensors | {
            key: tensor.cpu() for key, tensor in self._calibrator.extra(block).items()
        }

    def _finish_outside(self) -> None:
        """Write embeddings, final norm and output head, a module at a time, for one may be
        large.
        """
        modules = dict.fromkeys(key.rpartition(".")[0] for key in self._outside())
        for module in modules:
            if f"rest-{module}" not in self.shards.finished():
                names = [key for key in self._outside() if key.rpartition(".")[0] == module]
                self.shards.write(
                    f"rest-{module}", {name: self._fused.state[name] for name in names}
                )

    def _outside(self) -> list[str]:
        return outside_blocks(list(self._fused.state), self._fused.wiring)

    def _name(self, index: int) -> str:
        return self._fused.wiring.block(index)

    def _first_unfinished(self) -> int:
        finished = self.shards.finished()
        return next(
            (index for index in range(self._layers) if _shard(index) not in finished), self._layers
        )

    def _hidden(self, index: int) -> Path:
        return self._work / f"hidden-{index:05d}"

    def _activations(self, index: int, existing: Mapping[str, str] | None = None) -> Activations:
        """The hidden states that enter block ``index``."""
        return Activations(
            self._hidden(index), self._max_memory, persist=self._resumable, existing=existing
        )


def _shard(index: int) -> str:
    return f"block-{index:05d}"


def _fingerprint(batches: Sequence[Batch]) -> str:
    """SHA-256 over the shapes and tokens of ``batches``."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{list(batch.input_ids.shape)};".encode())
        digest.update(batch.input_ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
