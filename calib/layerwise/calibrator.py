"""Layer-wise mode: the calibrator of :mod:`calib.quantizing.calibrator`, one decoder block at a
time.

A block is smoothed when it is first met, then observed and rounded as the whole model would be.
Scales are the same, to the bit: the same batches run through the same block. The output head is
observed on what leaves the last block; rows of an embedding need no data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.architectures.experts import with_parameters
from calib.arithmetic.inputs import fake_quantize_input
from calib.arithmetic.scales import convert_to_scale
from calib.artifact import (
    OPTIONAL_PARTS,
    Provenance,
    QuantizedCache,
    QuantizedLinear,
    QuantizedModel,
)
from calib.artifact.files import (
    ShardedTensors,
    cache_key,
    load_artifact,
    save_description,
    smoothing_key,
)
from calib.data.batches import Batch
from calib.fusing import FusedModel
from calib.layerwise import Block, CalibrationRunner
from calib.layerwise.flow import DEFAULT_MAX_MEMORY
from calib.layerwise.protocol import RunBlock
from calib.modules.paths import weight_of
from calib.network.layout import StockTensors, oriented
from calib.process.progress import Progress, silent
from calib.quantizing.calibrator import Calibrator
from calib.quantizing.observation import Observed, Watchlist, observe
from calib.quantizing.plan import Quantization
from calib.smoothing.groups import groups_of
from calib.smoothing.methods import Smoothing
from calib.smoothing.observe import observe_channels
from calib.smoothing.smooth import smooth_groups

_HEAD = "head"


class _StandIn(nn.Module):
    """In place of the output head while what enters it is seen: a linear with a single output, for
    what the head gives does not matter.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = nn.Linear(width, 1, bias=False, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x)
        return result


class BlockCalibrator:
    """Quantizes the linears of one block after the other; see
    :class:`calib.layerwise.protocol.BlockQuantizer`.
    """

    def __init__(
        self, fused: FusedModel, quantization: Quantization, smoothing: Smoothing | None
    ) -> None:
        """
        Args:
            fused: the model, its tensors computed on access.
            quantization: what to do.
            smoothing: what moves outliers from inputs into weights, if anything.

        Raises:
            QuantizationError: a width is no multiple of the block that its format fixes.
        """
        self._calibrator = Calibrator(fused, quantization)
        self._calibrator.check_blocks()
        self._smoothing = smoothing
        self._extra: dict[int, dict[str, Tensor]] = {}

    @property
    def needs_data(self) -> bool:
        """Whether any block has to be run."""
        return self._smoothing is not None or bool(
            self._calibrator.watchlist(list(self._calibrator.quantization.linears))
        )

    @property
    def looks_at_head(self) -> bool:
        """Whether what enters the output head has to be seen."""
        head = self._calibrator.fused.wiring.head.name
        quantized = head in self._calibrator.quantization.linears
        return quantized and bool(self._calibrator.watchlist([head], caches=False))

    def quantize_outside(
        self, name: str, tensors: Mapping[str, Tensor], run: Callable[[nn.Module], None]
    ) -> QuantizedLinear | None:
        """Quantize an embedding or the output head, where that is to be quantized."""
        calibrator = self._calibrator
        if name not in calibrator.quantization.linears:
            return None
        observed = Observed()
        if name == calibrator.fused.wiring.head.name:
            stand_in = _StandIn(calibrator.fused.wiring.sizes.hidden, calibrator.fused.dtype)
            watchlist = _local(calibrator.watchlist([name], caches=False), {name: _HEAD})
            observed = _renamed(observe(stand_in, watchlist, run), {_HEAD: name})
        return calibrator.quantized(name, tensors, observed)

    def calibrate(
        self, block: Block, names: Sequence[str], run: RunBlock
    ) -> Mapping[str, QuantizedLinear]:
        """Quantize those of ``names`` that are to be quantized."""
        if block.index not in self._extra:
            self._extra[block.index] = {}
            if self._smoothing is not None:
                self._smooth(block, run, self._smoothing)
            self._observe_cache(block, run)
        chosen = [name for name in names if name in self._calibrator.quantization.linears]
        observed = self._observe(block, chosen, run)
        state = self._state(block)
        return {name: self._calibrator.quantized(name, state, observed) for name in chosen}

    def tensors(self, quantized: QuantizedLinear) -> Mapping[str, Tensor]:
        """What is stored of a linear, by the name of the part."""
        return {
            key.removeprefix(f"{quantized.name}."): tensor
            for key, tensor in quantized.tensors().items()
        }

    def extra(self, block: Block) -> Mapping[str, Tensor]:
        """What is stored of a block beside its linears: scales of the cache, and those folded by
        smoothing.
        """
        return self._extra[block.index]

    def replacement(
        self, quantized: QuantizedLinear, linear: nn.Module, w_quant: bool, a_quant: bool
    ) -> Callable[[Tensor], Tensor]:
        """The linear as the quantized model computes it, in the dtype of the block."""
        weight = weight_of(linear)
        used = quantized.values().to(weight) if w_quant else weight
        scale = (
            None
            if quantized.input_scale is None
            else quantized.input_scale.float().to(weight.device)
        )
        zero = (
            None
            if quantized.input_zero_point is None
            else quantized.input_zero_point.float().to(weight.device)
        )

        def compute(x: Tensor) -> Tensor:
            if a_quant and quantized.input_scheme is not None:
                x = fake_quantize_input(x.float(), quantized.input_scheme, scale, zero).to(x.dtype)
            return functional.linear(x, used, quantized.bias)

        return compute

    def _observe(self, block: Block, names: Sequence[str], run: RunBlock) -> Observed:
        """What has to be seen of the linears ``names``, by their names in the model."""
        watchlist = self._calibrator.watchlist(names, caches=False)
        local = {name: block.local(name) for name in names}
        observed = observe(block.module, _local(watchlist, local), run)
        return _renamed(observed, {own: name for name, own in local.items()})

    def _smooth(self, block: Block, run: RunBlock, method: Smoothing) -> None:
        fused = self._calibrator.fused
        schemes = with_parameters(self._calibrator.quantization.linears, fused.wiring)
        groups = groups_of(
            fused.wiring, fused.rotations, schemes, block.index, search=method.needs_moment
        )
        statistics = observe_channels(
            block.module, groups, run, moments=method.needs_moment, prefix=f"{block.name}."
        )
        state = self._state(block)
        rows = smooth_groups(state, groups, method, statistics, schemes, fused.wiring)
        stock = StockTensors(state, fused.wiring)
        block.module.load_state_dict(
            {block.local(key): tensor for key, tensor in stock.items()}, assign=True
        )
        self._extra[block.index] |= {
            smoothing_key(row.name): row.scales for row in rows if row.scales is not None
        }

    def _state(self, block: Block) -> dict[str, Tensor]:
        """The tensors of a block by their names in the model."""
        fused = self._calibrator.fused
        state = block.module.state_dict(prefix=f"{block.name}.")
        return oriented(state, fused.wiring)

    def _observe_cache(self, block: Block, run: RunBlock) -> None:
        scheme = self._calibrator.quantization.cache
        if scheme is None:
            return
        attention = block.local(self._calibrator.attentions()[block.index])
        watchlist = Watchlist({}, "min_max", caches={block.index: attention})
        keys, values = observe(block.module, watchlist, run).caches[block.index]
        for part, amax in (("key", keys), ("value", values)):
            scale = convert_to_scale(
                amax, scheme.format.maxbound, dtype=self._calibrator.fused.dtype
            )
            self._extra[block.index][cache_key(block.index, part)] = scale


def _local(watchlist: Watchlist, names: Mapping[str, str]) -> Watchlist:
    """``watchlist`` with modules by other ``names``."""
    return Watchlist(
        inputs={names[name]: scheme for name, scheme in watchlist.inputs.items()},
        observer=watchlist.observer,
        moments=[names[name] for name in watchlist.moments],
    )


def _renamed(observed: Observed, names: Mapping[str, str]) -> Observed:
    """``observed`` with modules by other ``names``."""
    return Observed(
        amax={names[name]: amax for name, amax in observed.amax.items()},
        limits={names[name]: limits for name, limits in observed.limits.items()},
        moments={names[name]: moment for name, moment in observed.moments.items()},
    )


@dataclass(frozen=True)
class WalkSettings:
    """How :func:`quantize_blockwise` walks the blocks."""

    device: torch.device | str = "cpu"
    """Where blocks run."""
    asym: bool = False
    """Calibrate each linear on what the quantized ones before it give."""
    w_quant: bool = True
    """With ``asym``, round the weights of those."""
    a_quant: bool = True
    """With ``asym``, round the inputs of those."""
    max_memory: int = DEFAULT_MAX_MEMORY
    """Bytes of hidden states held in memory."""
    resume: bool = False
    """Go on with what the work folder holds."""
    resumable: bool = True
    """Write all hidden states to disk, so that a later run can go on."""
    depends_on: Mapping[str, str] = field(default_factory=dict)
    """What the result depends on beside the model, the batches and all this, by name."""


def quantize_blockwise(
    fused: FusedModel,
    quantization: Quantization,
    batches: Sequence[Batch],
    provenance: Provenance,
    work: Path,
    folder: Path,
    *,
    smoothing: Smoothing | None = None,
    files: Mapping[str, Path] | None = None,
    walk: WalkSettings | None = None,
    progress: Progress = silent,
) -> QuantizedModel:
    """Quantize a model block by block into ``folder``, with no more than a block of it in memory.

    Args:
        fused: the folded and rotated model, lazy.
        quantization: what to do.
        batches: calibration tokens without padding; run only if something has to be seen.
        provenance: recorded in the result.
        work: where shards and hidden states are kept until the result is complete.
        folder: empty folder that becomes the saved model, on the same disk as ``work``.
        smoothing: what moves outliers from inputs into weights, if anything.
        files: side files of the checkpoint, copied into the result.
        walk: how the blocks are walked; :class:`WalkSettings` by default.
        progress: called after every block.

    Returns:
        The saved model, memory-mapped.

    Raises:
        QuantizationError, OutputError, CheckpointError: as the parts do.
    """
    walk = walk or WalkSettings()
    calibrator = BlockCalibrator(fused, quantization, smoothing)
    runner = CalibrationRunner(
        fused,
        batches if walk.asym or calibrator.needs_data else [],
        calibrator,
        work,
        max_memory=walk.max_memory,
        resume=walk.resume,
        resumable=walk.resumable,
        settings=walk.depends_on,
        progress=progress,
    )
    runner.layerwise_calibration(walk.device, walk.asym, walk.w_quant, walk.a_quant)

    for path in runner.shards.paths():
        (folder / path.name).hardlink_to(path)
    model = _assembled(fused, quantization, ShardedTensors(folder), provenance, files or {})
    save_description(model, folder)
    return load_artifact(folder)


def _assembled(
    fused: FusedModel,
    quantization: Quantization,
    tensors: ShardedTensors,
    provenance: Provenance,
    files: Mapping[str, Path],
) -> QuantizedModel:
    """The artifact of finished shards."""
    calibrator = Calibrator(fused, quantization)
    linears = {
        name: QuantizedLinear(
            name=name,
            weight_scheme=scheme.weight,
            input_scheme=scheme.input,
            online_rotation=calibrator.online(name),
            weight=tensors[f"{name}.weight"],
            weight_scale=tensors[f"{name}.weight_scale"],
            **{part: tensors.get(f"{name}.{part}") for part in OPTIONAL_PARTS},
        )
        for name, scheme in quantization.linears.items()
    }
    cache = None
    if quantization.cache is not None:
        keys, values = (
            {layer: tensors[cache_key(layer, part)] for layer in calibrator.attentions()}
            for part in ("key", "value")
        )
        cache = QuantizedCache(quantization.cache, keys, values)

    start = smoothing_key("")
    scales = {key.removeprefix(start): tensors[key] for key in tensors if key.startswith(start)}
    parts = {key for linear in linears.values() for key in linear.tensors()} | {
        smoothing_key(name) for name in scales
    }
    parts |= (
        set()
        if cache is None
        else {cache_key(layer, p) for layer in cache.key_scale for p in ("key", "value")}
    )
    floats = {key: tensors[key] for key in tensors if key not in parts}
    return calibrator.model(linears, floats, cache, provenance, files, smoothing=scales)
