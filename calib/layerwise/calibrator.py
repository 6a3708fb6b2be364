"""Layer-wise mode: the calibrator of :mod:`calib.quantizing.calibrator`, one decoder block at a
time.

A block is smoothed when it is first met, then observed and rounded as the whole model would be.
Scales are the same, to the bit: the same batches run through the same block. Nothing is trained
here, and nothing compared: both would need the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.architectures.experts import with_parameters
from calib.arithmetic.inputs import fake_quantize_input
from calib.arithmetic.scales import convert_to_scale
from calib.artifact import LINEAR_PARTS, Provenance, QuantizedCache, QuantizedLinear, QuantizedModel
from calib.artifact.files import (
    ShardedTensors,
    cache_key,
    load_artifact,
    save_description,
    smoothing_key,
)
from calib.data.batches import Batch
from calib.errors import QuantizationError
from calib.fusing import FusedModel
from calib.layerwise import Block, CalibrationRunner
from calib.layerwise.protocol import Run
from calib.progress import Progress, silent
from calib.quantizing.calibrator import Calibrator
from calib.quantizing.observation import Observed, Wanted, observe
from calib.quantizing.plan import Quantization
from calib.smoothing.groups import groups_of
from calib.smoothing.methods import Smoothing
from calib.smoothing.observe import observe_channels
from calib.smoothing.smooth import smooth_groups


class BlockCalibrator:
    """Quantizes the linears of one block after the other; see
    :class:`calib.layerwise.protocol.Calibrator`.
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
            QuantizationError: a width is no multiple of the block that its format fixes, or the
                output head or an embedding is to be quantized, which lie outside of the blocks.
        """
        self._calibrator = Calibrator(fused, quantization)
        self._calibrator.check_blocks()
        self._smoothing = smoothing
        self._extra: dict[int, dict[str, Tensor]] = {}
        outside = [name for name in quantization.linears if self._layer(name) is None]
        if outside:
            raise QuantizationError(
                f"layer-wise mode quantizes decoder blocks only, not {', '.join(outside)}",
                hint=(
                    "leave that override out, or quantize the whole model at once (without"
                    " --layerwise)"
                ),
            )

    @property
    def needs_data(self) -> bool:
        """Whether any block has to be run."""
        return self._smoothing is not None or bool(
            self._calibrator.wanted(list(self._calibrator.quantization.linears))
        )

    def calibrate(
        self, block: Block, names: Sequence[str], run: Run
    ) -> Mapping[str, QuantizedLinear]:
        """Quantize those of ``names`` that are to be quantized."""
        if block.index not in self._extra:
            self._extra[block.index] = {}
            if self._smoothing is not None:
                self._smooth(block, run, self._smoothing)
            self._observe_cache(block, run)
        chosen = [name for name in names if name in self._calibrator.quantization.linears]
        wanted = self._calibrator.wanted(chosen, caches=False)
        local = Wanted(
            inputs={block.local(name): scheme for name, scheme in wanted.inputs.items()},
            observer=wanted.observer,
            moments=[block.local(name) for name in wanted.moments],
        )
        seen = observe(block.module, local, run)
        observed = Observed(
            limits={f"{block.name}.{name}": limits for name, limits in seen.limits.items()},
            moments={f"{block.name}.{name}": moment for name, moment in seen.moments.items()},
        )
        state = _state(block)
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
        weight = (
            linear.weight
            if self._calibrator.fused.wiring.by_name[quantized.name].layout != "conv1d"
            else linear.weight.T
        )
        assert isinstance(weight, Tensor)
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

    def _layer(self, name: str) -> int | None:
        spec = self._calibrator.fused.wiring.by_name.get(name)
        return None if spec is None else spec.layer

    def _smooth(self, block: Block, run: Run, method: Smoothing) -> None:
        fused = self._calibrator.fused
        schemes = with_parameters(self._calibrator.quantization.linears, fused.wiring)
        groups = groups_of(fused.wiring, fused.rotations, schemes, block.index)
        statistics = observe_channels(
            block.module, groups, run, moments=method.needs_moment, prefix=f"{block.name}."
        )
        state = _state(block)
        rows = smooth_groups(state, groups, method, statistics, schemes, fused.wiring)
        block.module.load_state_dict(
            {block.local(key): tensor for key, tensor in state.items()}, assign=True
        )
        self._extra[block.index] |= {
            smoothing_key(row.name): row.scales for row in rows if row.scales is not None
        }

    def _observe_cache(self, block: Block, run: Run) -> None:
        scheme = self._calibrator.quantization.cache
        if scheme is None:
            return
        attention = block.local(self._calibrator.attentions()[block.index])
        wanted = Wanted({}, "min_max", caches={block.index: attention})
        keys, values = observe(block.module, wanted, run).caches[block.index]
        for part, amax in (("key", keys), ("value", values)):
            scale = convert_to_scale(
                amax, scheme.format.maxbound, dtype=self._calibrator.fused.dtype
            )
            self._extra[block.index][cache_key(block.index, part)] = scale


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
    device: torch.device | str = "cpu",
    asym: bool = False,
    w_quant: bool = True,
    a_quant: bool = True,
    max_memory: int,
    resume: bool = False,
    resumable: bool = True,
    settings: Mapping[str, str] | None = None,
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
        device: where blocks run.
        asym: calibrate each linear on what the quantized ones before it give.
        w_quant: with ``asym``, round the weights of those.
        a_quant: with ``asym``, round the inputs of those.
        max_memory: bytes of hidden states held in memory.
        resume: go on with what ``work`` holds.
        resumable: write all hidden states to disk, so that a later run can go on.
        settings: what the result depends on beside all this.
        progress: called after every block.

    Returns:
        The saved model, memory-mapped.

    Raises:
        QuantizationError, OutputError, CheckpointError: as the parts do.
    """
    calibrator = BlockCalibrator(fused, quantization, smoothing)
    runner = CalibrationRunner(
        fused,
        batches if asym or calibrator.needs_data else [],
        calibrator,
        work,
        max_memory=max_memory,
        resume=resume,
        resumable=resumable,
        settings=settings,
        progress=progress,
    )
    runner.layerwise_calibration(device, asym, w_quant, a_quant)
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
            **{part: tensors.get(f"{name}.{part}") for part in LINEAR_PARTS[2:]},
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


def _state(block: Block) -> dict[str, Tensor]:
    """The tensors of a block by their names in the model."""
    return block.module.state_dict(prefix=f"{block.name}.")
