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
from typing import Generic

import torch
from torch import Tensor, nn

from calib.architectures.groups import reading_groups
from calib.data.batches import Batch
from calib.errors import CheckpointError
from calib.fusing import FusedModel
from calib.layerwise.blocks import Block
from calib.layerwise.flow import DEFAULT_MAX_MEMORY, Flow
from calib.layerwise.protocol import BlockQuantizer, Q
from calib.layerwise.shards import ShardStore
from calib.layerwise.walk import calibrate_at_once, calibrate_in_turn
from calib.network.layout import oriented
from calib.process.progress import Progress, silent, track


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
        self._flow = Flow(
            fused,
            batches,
            work,
            max_memory=max_memory,
            persist=resumable,
            to_the_end=calibrator.looks_at_head,
        )
        self._fused = fused
        self._calibrator = calibrator
        self._work = work
        self._resumable = resumable
        self._settings = {
            "batches": _fingerprint(self._flow.batches),
            "dtype": str(fused.dtype),
            **(settings or {}),
        }
        self._progress = progress
        self._layers = fused.wiring.sizes.layers
        self._prepared = False
        self.shards = ShardStore(work, resume=resume)

    def prepare_calibration(self) -> None:
        """Collect what enters the first block that is not finished, and how the model calls each
        block.

        Raises:
            CheckpointError: the hidden states to go on with are missing or damaged.
        """
        start = self._first_unfinished()
        head_left = _outside_shard(self._fused.wiring.head.name) not in self.shards.finished()
        runs = start < self._layers or (self._flow.to_the_end and head_left)
        for folder in self._work.glob("hidden-*"):
            if not runs or folder != self._flow.folder(start):
                shutil.rmtree(folder)
        existing = self.shards.next_inputs(_shard(start - 1)) if start and runs else None
        if existing is not None and len(existing) != len(self._flow.batches):
            raise CheckpointError(
                f"'{self._work}' keeps no hidden states to go on from",
                hint="start again in another --work-dir",
            )
        if runs:
            self._flow.enter(start, existing)
        self._prepared = True

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
        if not self._prepared:
            self.prepare_calibration()
        flags = {"asym": asym, "w_quant": w_quant, "a_quant": a_quant}
        self.shards.bind(
            self._settings | {name: str(value).lower() for name, value in flags.items()}
        )
        self._flow.device = torch.device(device)
        for index in track(range(self._layers), "calibrate", self._layers, self._progress):
            if _shard(index) not in self.shards.finished():
                self._finish_block(index, **flags)
        self._finish_outside()

    def _finish_block(self, index: int, *, asym: bool, w_quant: bool, a_quant: bool) -> None:
        groups = reading_groups(self._fused.wiring, index)
        with self._flow.through(index) as passage:
            quantized = (
                calibrate_in_turn(
                    self._calibrator, passage, groups, w_quant=w_quant, a_quant=a_quant
                )
                if asym
                else calibrate_at_once(self._calibrator, passage, groups)
            )
            tensors = self._tensors(passage.block, self._flow.tensors_of(index), quantized)
            outputs = passage.outputs if self._resumable else None
            kept = {} if outputs is None else outputs.digests
            self.shards.write(_shard(index), tensors, next_inputs=kept)

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
        modules = dict.fromkeys(key.rpartition(".")[0] for key in self._flow.outside)
        for module in modules:
            shard = _outside_shard(module)
            if shard not in self.shards.finished():
                names = [key for key in self._flow.outside if key.rpartition(".")[0] == module]
                self.shards.write(shard, self._outside_tensors(module, names))
        self._flow.delete()

    def _outside_tensors(self, module: str, names: Sequence[str]) -> dict[str, Tensor]:
        """What is stored of a module that lies in no block."""
        tensors = {name: self._fused.state[name] for name in names}
        quantized = self._calibrator.quantize_outside(module, tensors, self._run_final)
        if quantized is None:
            return tensors
        parts = self._calibrator.tensors(quantized)
        return {f"{module}.{part}": tensor.cpu() for part, tensor in parts.items()}

    @torch.no_grad()
    def _run_final(self, module: nn.Module) -> None:
        device = self._flow.device
        module.to(device)
        for hidden in self._flow.final():
            module(hidden.to(device))

    def _first_unfinished(self) -> int:
        finished = self.shards.finished()
        return next(
            (index for index in range(self._layers) if _shard(index) not in finished), self._layers
        )


def _shard(index: int) -> str:
    return f"block-{index:05d}"


def _outside_shard(module: str) -> str:
    return f"rest-{module}"


def _fingerprint(batches: Sequence[Batch]) -> str:
    """SHA-256 over the shapes and tokens of ``batches``."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{list(batch.input_ids.shape)};".encode())
        digest.update(batch.input_ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
