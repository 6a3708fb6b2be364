"""What a scheme does to each linear, and how many outliers it has: a second pass, which knows the
limits of the first.

    damage = |x̂ Ŵᵀ − x Wᵀ|² / |x Wᵀ|²,    x̂ and Ŵ as the scheme rounds them, over all tokens

With ``x̂ = x + e`` and ``Ŵ = W + E`` the difference is ``e Wᵀ + x Eᵀ`` to first order. If neither
error nor input favoured a direction, the damage would be ``|e|² / |x|² + |E|² / |W|²``, the input's
error and the weight's. But inputs lie along directions that the weight amplifies: on the embedded
model that sum is three times too large, 0.4 to 13 times for single linears, and may order them
wrongly. So the damage is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from calib.architectures import LinearSpec
from calib.arithmetic.grids import expand_grid, round_to_grid, weight_grid
from calib.arithmetic.inputs import fake_quantize_input, input_grid
from calib.data.batches import Batch
from calib.errors import QuantizationError
from calib.process.progress import Progress, silent
from calib.schemes import LinearScheme, PerCluster, TensorScheme
from calib.stats.clusters import cluster_limits, expand_clusters
from calib.stats.linears import LinearMoments, linear_weight
from calib.stats.moments import CHUNK_ELEMENTS, MomentStatistics
from calib.stats.observe import observe

OUTLIER_STDS = 6.0
"""A value is an outlier if its magnitude is above this many standard deviations of its tensor; of
normal values with mean zero, two in a billion are."""


@dataclass(frozen=True)
class LinearDamage:
    """What a scheme does to one linear.

    Attributes:
        damage: relative squared error of its output, bias left out.
        input_error: relative squared error of its input; 0 where inputs stay in float.
        weight_error: relative squared error of its weight, rounded to nearest.
        input_outliers: share of the values of its input that are outliers, 0 to 1.
        output_outliers: the same of its output.
        weight_outliers: the same of its weight.
    """

    damage: float
    input_error: float
    weight_error: float
    input_outliers: float
    output_outliers: float
    weight_outliers: float


@dataclass
class _Error:
    """A running relative squared error; 0 where everything is zero."""

    lost: float = 0.0
    kept: float = 0.0

    def add(self, rounded: Tensor, exact: Tensor) -> None:
        self.lost += float((rounded - exact).square().sum())
        self.kept += float(exact.square().sum())

    @property
    def relative(self) -> float:
        return self.lost / self.kept if self.kept > 0 else 0.0


@dataclass
class _Sums:
    """What the second pass adds up over one linear."""

    input_outliers: int = 0
    output_outliers: int = 0
    input: _Error = field(default_factory=_Error)
    output: _Error = field(default_factory=_Error)


def linear_damage(
    model: nn.Module,
    specs: Sequence[LinearSpec],
    moments: Mapping[str, LinearMoments],
    schemes: Mapping[str, LinearScheme],
    batches: Sequence[Batch],
    *,
    clusters: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> dict[str, LinearDamage]:
    """Run ``batches`` through ``model`` again and measure what ``schemes`` do to the linears of
    ``specs``, by name.

    Args:
        model: the model that ``moments`` were taken from.
        specs: which linears, and how they store their weights.
        moments: what :func:`calib.stats.linears.linear_moments` returned for the same batches.
        schemes: how they are quantized, by name; one that is not in it stays in float. Static
            scales cover the moments' least and greatest values.
        batches: token rows; pad positions are left out.
        clusters: int64 ``[in]`` by name, for schemes with one scale per cluster.
        progress: called after each batch.

    Raises:
        QuantizationError: the scheme asks for clusters that are not given, or is none of
            activations; or a scale is not finite.
    """
    labels = clusters or {}
    quantizers = {
        name: _input_quantizer(scheme.input, moments[name].input, labels.get(name))
        for name, scheme in schemes.items()
        if scheme.input is not None and name in moments
    }
    input_limits = {spec.name: outlier_limit(moments[spec.name].input) for spec in specs}
    output_limits = {spec.name: outlier_limit(moments[spec.name].output) for spec in specs}
    weights = {spec.name: linear_weight(model, spec) for spec in specs}
    sums = {spec.name: _Sums() for spec in specs}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        found, scheme = sums[name], schemes.get(name)
        found.input_outliers += int((x.abs() > input_limits[name]).sum())
        found.output_outliers += int((y.abs() > output_limits[name]).sum())
        if scheme is None:
            return
        # Rounded anew for each batch: those of all linears at once would be a second model in
        # memory.
        weight, rounded = weights[name].float(), rounded_weight(weights[name], scheme.weight)
        for chunk in torch.split(x.float(), max(1, CHUNK_ELEMENTS // max(weight.shape))):
            seen = quantizers[name](chunk) if name in quantizers else chunk
            found.input.add(seen, chunk)
            found.output.add(seen @ rounded.T, chunk @ weight.T)

    observe(model, [spec.name for spec in specs], batches, see, stage="damage", progress=progress)
    return {
        name: _damage(weights[name], schemes.get(name), moments[name], sums[name])
        for name in weights
    }


def outlier_limit(moments: MomentStatistics) -> float:
    """The magnitude above which a value of the tensor is an outlier."""
    return OUTLIER_STDS * float(moments.pooled().std)


def rounded_weight(weight: Tensor, scheme: TensorScheme) -> Tensor:
    """A weight ``[out, in]`` rounded to nearest, float32."""
    scale, zero = expand_grid(weight_grid(weight, scheme), weight.shape, scheme.granularity)
    return round_to_grid(weight.float(), scale, zero, scheme.format)


def _input_quantizer(
    scheme: TensorScheme, moments: MomentStatistics, labels: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """What a linear does to its input: static scales cover the least and greatest values of
    ``moments``.
    """
    if not scheme.needs_calibration:
        return partial(fake_quantize_input, scheme=scheme)
    low, high = moments.minimum.float(), moments.maximum.float()
    if isinstance(scheme.granularity, PerCluster):
        if labels is None:
            raise QuantizationError(
                "a scheme with one scale per cluster needs the cluster of each channel"
            )
        limits = cluster_limits(low, high, labels, scheme.granularity.clusters)
        low, high = (expand_clusters(limit, labels) for limit in limits)
    else:
        low, high = low.min(), high.max()
    grid = input_grid(low, high, scheme, torch.float32)

    def quantizer(x: Tensor) -> Tensor:
        zero = None if grid.zero_point is None else grid.zero_point.to(x.device)
        return fake_quantize_input(x, scheme, grid.scale.to(x.device), zero)

    return quantizer


def _damage(
    weight: Tensor, scheme: LinearScheme | None, moments: LinearMoments, sums: _Sums
) -> LinearDamage:
    error = _Error()
    if scheme is not None:
        error.add(rounded_weight(weight, scheme.weight), weight.float())
    return LinearDamage(
        damage=sums.output.relative,
        input_error=sums.input.relative,
        weight_error=error.relative,
        input_outliers=sums.input_outliers / moments.input.values,
        output_outliers=sums.output_outliers / moments.output.values,
        weight_outliers=float((weight.abs() > outlier_limit(moments.weight_in)).double().mean()),
    )
