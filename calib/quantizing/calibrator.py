"""From a fused float model to the :class:`~calib.artifact.QuantizedModel`: observe, turn limits
into scales, round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.architectures import Space, Wiring
from calib.architectures.experts import expert_index
from calib.architectures.groups import merged_linears
from calib.arithmetic.grids import Grid
from calib.arithmetic.inputs import input_grid, symmetric_input_grid
from calib.arithmetic.scales import convert_to_scale
from calib.artifact import Provenance, QuantizedCache, QuantizedLinear, QuantizedModel
from calib.errors import DataError, QuantizationError
from calib.fusing import FusedModel, materialize
from calib.modules.watch import Run
from calib.network.skeleton import oriented_shapes, portable_config
from calib.process.progress import Progress, silent, track
from calib.quantizing.observation import Observed, Watchlist, observe
from calib.quantizing.plan import Quantization
from calib.schemes import PerBlock
from calib.weights.algorithms import algorithm_named

KEPT_HEAD = "output head: float unless asked for"
KEPT_ROUTER = "router or gate: decides which experts run, and is tiny"


def quantize_model(
    fused: FusedModel,
    quantization: Quantization,
    forward_loop: Run | None,
    provenance: Provenance,
    *,
    files: Mapping[str, Path] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> QuantizedModel:
    """Calibrate ``fused`` and quantize its linears.

    Args:
        fused: the folded, rotated and smoothed model in the compute dtype.
        quantization: what to quantize, and how.
        forward_loop: feeds calibration batches to the model it is given; ``None`` where no data is
            needed.
        provenance: recorded in the result.
        files: side files of the checkpoint, recorded in the result.
        device: where calibration runs.
        progress: called after every weight.

    Raises:
        DataError: data is needed and there is no forward loop.
        QuantizationError: a linear was never reached, its statistics yield no finite scale, or its
            width is no multiple of the block that its format fixes.
    """
    calibrator = Calibrator(fused, quantization)
    calibrator.check_blocks()
    observed = Observed()
    watchlist = calibrator.watchlist(list(quantization.linears))
    if watchlist:
        if forward_loop is None:
            raise DataError("this quantization needs calibration data", hint="pass a forward loop")
        network: nn.Module = materialize(fused, device=device)
        observed = observe(network, watchlist, forward_loop)
        del network

    names = track(quantization.linears, "round weights", len(quantization.linears), progress)
    linears = {name: calibrator.quantized(name, fused.state, observed) for name in names}
    replaced = calibrator.replaced(linears)
    return calibrator.model(
        linears,
        {key: tensor for key, tensor in fused.state.items() if key not in replaced},
        calibrator.cache(observed),
        provenance,
        files or {},
    )


@dataclass(frozen=True)
class Calibrator:
    """Quantizes the linears of one model, all at once or block by block.

    Attributes:
        fused: the model; its tensors may be computed on access.
        quantization: what to do.
    """

    fused: FusedModel
    quantization: Quantization

    def check_blocks(self) -> None:
        """See :func:`check_blocks`."""
        check_blocks(self.quantization, self.fused.wiring)

    def watchlist(self, names: Sequence[str], *, caches: bool = True) -> Watchlist:
        """What has to be observed to quantize the linears ``names``, and the cache of every layer
        with ``caches``.
        """
        linears = self.quantization.linears
        algorithm = algorithm_named(self.quantization.weights)
        inputs = {
            name: scheme
            for name in names
            if (scheme := linears[name].input) is not None and scheme.needs_calibration
        }
        return Watchlist(
            inputs=inputs,
            observer=self.quantization.observer,
            moments=[
                name
                for name in names
                if algorithm.needs_moment and name in self.fused.wiring.by_name
            ],
            caches=self.attentions() if caches and self.quantization.cache is not None else {},
        )

    def quantized(
        self, name: str, state: Mapping[str, Tensor], observed: Observed
    ) -> QuantizedLinear:
        """The quantized linear (or embedding) ``name``, from the tensors of ``state`` and what was
        observed.

        Raises:
            QuantizationError: its weight or its input yields no finite scale.
        """
        scheme = self.quantization.linears[name]
        weight = self._weight(name, state)
        _check_finite(name, weight)
        try:
            algorithm = algorithm_named(self.quantization.weights)
            moment = observed.moments.get(name)
            if algorithm.needs_moment and moment is None:  # an embedding: its input is no vector
                algorithm = algorithm_named("rtn")
            amax = self._shared_amax(name, state) if scheme.weight.scale_format == "e4m3" else None
            rounded = algorithm.round(weight, moment, scheme.weight, self.fused.dtype, amax=amax)
            grid = self._input_grid(name, observed)
        except QuantizationError as error:
            raise QuantizationError(
                f"no valid scale for '{name}': {error.message}", hint=error.hint
            ) from error

        return QuantizedLinear(
            name=name,
            weight=rounded.stored,
            weight_scale=rounded.grid.scale,
            weight_scheme=scheme.weight,
            bias=state.get(f"{name}.bias"),
            input_scheme=scheme.input,
            input_scale=None if grid is None else grid.scale,
            online_rotation=self.online(name),
            weight_zero_point=rounded.grid.zero_point,
            weight_second_scale=rounded.grid.second_level,
            weight_order=rounded.order,
            input_zero_point=None if grid is None else grid.zero_point,
        )

    def replaced(self, linears: Collection[str]) -> set[str]:
        """Keys of the fused tensors that the quantized ``linears`` stand in place of."""
        keys = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
        return keys | {
            self.fused.wiring.by_name[name].weight
            for name in linears
            if name in self.fused.wiring.by_name
        }

    def cache(self, observed: Observed) -> QuantizedCache | None:
        """The quantized KV cache, if there is to be one."""
        scheme = self.quantization.cache
        if scheme is None:
            return None
        keys, values = (
            {
                layer: convert_to_scale(amax[index], scheme.format.maxbound, dtype=self.fused.dtype)
                for layer, amax in sorted(observed.caches.items())
            }
            for index in (0, 1)
        )
        return QuantizedCache(scheme, keys, values)

    def model(
        self,
        linears: Mapping[str, QuantizedLinear],
        floats: Mapping[str, Tensor],
        cache: QuantizedCache | None,
        provenance: Provenance,
        files: Mapping[str, Path],
        smoothing: Mapping[str, Tensor] | None = None,
    ) -> QuantizedModel:
        """The artifact of these parts; ``smoothing`` is the fused model's unless given."""
        fused = self.fused
        return QuantizedModel(
            config=portable_config(fused.config),
            scheme=self.quantization.scheme,
            dtype=fused.dtype,
            linears=linears,
            floats=floats,
            kept={**kept_reasons(fused, linears), **self.quantization.kept},
            rotations=fused.rotations,
            provenance=provenance,
            files=dict(files),
            cache=cache,
            smoothing=fused.smoothing if smoothing is None else smoothing,
            prefix=fused.prefix,
            norms_folded=fused.norms_folded,
        )

    def _weight(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        """The weight ``[out, in]``; an expert may be a slice."""
        spec = self.fused.wiring.by_name.get(name)
        if spec is not None and spec.weight in state and spec.layout == "experts":
            return state[spec.weight][expert_index(name)]
        return state[f"{name}.weight"]

    def _shared_amax(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        """Largest magnitude in the weights of ``name`` and of those that runtimes merge with it,
        float32 ``[]``.

        Query, key and value, and gate and up, become one matrix in vLLM and TensorRT-LLM, which has
        one second level of scales. ModelOpt's export gives them one as well
        (``preprocess_linear_fusion``).
        """
        linears = self.quantization.linears
        beside = [
            other
            for other in self._merged.get(name, (name,))
            if other in linears and linears[other].weight == linears[name].weight
        ]
        return torch.stack(
            [self._weight(other, state).detach().abs().amax().float() for other in beside]
        ).amax()

    @cached_property
    def _merged(self) -> dict[str, tuple[str, ...]]:
        return merged_linears(self.fused.wiring)

    def _input_grid(self, name: str, observed: Observed) -> Grid | None:
        """The calibrated part of what the input of ``name`` is rounded to, if there is one."""
        scheme = self.quantization.linears[name].input
        if scheme is None:
            return None
        if name in observed.amax:
            return symmetric_input_grid(observed.amax[name], scheme, self.fused.dtype)
        if name in observed.limits:
            return input_grid(*observed.limits[name], scheme, self.fused.dtype)
        return None

    def online(self, name: str) -> str | None:
        """Name of the online rotation that acts on the input of a linear, if one does."""
        spec = self.fused.wiring.by_name.get(name)
        if spec is None or spec.reads is not Space.FFN or spec.layer is None:
            return None
        rotation = self.fused.rotations.r4(spec.layer, spec.branch)
        return None if rotation is None else rotation.name

    def attentions(self) -> dict[int, str]:
        """Attention modules by layer."""
        wiring = self.fused.wiring
        return {layer: wiring.attention(layer) for layer in wiring.layers}


def check_blocks(quantization: Quantization, wiring: Wiring) -> None:
    """Formats with blocks of a fixed size exist for widths that are a multiple of it only.

    Raises:
        QuantizationError: naming every linear whose width is not.
    """
    shapes, specs = oriented_shapes(wiring), wiring.by_name
    bad: dict[str, tuple[int, int]] = {}
    for name, scheme in quantization.linears.items():
        granularity = scheme.weight.granularity
        if scheme.weight.scale_format == "compute" or not isinstance(granularity, PerBlock):
            continue
        spec = specs.get(name)  # an embedding has none
        width = shapes[f"{name}.weight" if spec is None else spec.weight][-1]
        if width % granularity.size:
            bad[name if spec is None else spec.name] = (width, granularity.size)
    if bad:
        name, (width, size) = next(iter(bad.items()))
        raise QuantizationError(
            f"blocks of {size} do not divide the {width} input features of {', '.join(bad)}",
            hint=(
                f"leave them in float with --override '{name}=float', or choose a scheme without"
                " fixed blocks"
            ),
        )


def kept_reasons(fused: FusedModel, quantized: Collection[str]) -> dict[str, str]:
    """Why each linear that is not in ``quantized`` stays in float, by module name.

    A 3-D expert parameter is quantized where its experts are, which have names of their own.
    """
    head = fused.wiring.head.name
    return dict(fused.wiring.architecture.kept) | {
        spec.name: KEPT_HEAD if spec.name == head else KEPT_ROUTER
        for spec in fused.wiring.linears
        if spec.name not in quantized and f"{spec.name}.0" not in quantized
    }


def _check_finite(name: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise QuantizationError(
            f"the weights of '{name}' hold NaN or Inf",
            hint="the checkpoint is damaged; download or export it again",
        )
