"""How large a smoothing scale is: SmoothQuant's formula and AWQ's search, for all linears that
share one.

    SmoothQuant:  s_j = amax(x_j)^a / amax(W_j)^(1 - a)                    (Xiao et al., 2023,
    equation 4) AWQ:          s_j = mean|x_j|^r / w_j^(1 - r),  over sqrt(max s min s) (Lin et al.,
    2023, section 3.2)

``W_j`` are the j-th columns of every reader, ``w_j`` their mean magnitude in units of the largest
weight that shares a scale. The paper's formula is the numerator; the weights' part is that of
ModelOpt and of AutoAWQ (``duo_scaling``), and was better by measurement (docs/smoothing.md).

A search takes the candidate with the least error of all outputs of the group. With ``dW = W - Q(W
s) / s`` and the second moment ``H = E[x^T x]`` of the inputs,

    E|x dW^T|^2 = tr(dW H dW^T)

is that error exactly, for the weights; no output is computed. Rounding the inputs ``x / s`` to
integers a step ``D`` apart adds an error of variance ``D^2 / 12`` to each, and ``D^2 / 12 |W s|^2``
to the outputs. Floating-point formats round in proportion to the value, whatever its scale, so
their inputs count for nothing here.

Everything is float32 but the formulas of ``s``, which are float64. A channel that is never used, by
inputs or by weights, keeps ``s = 1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calib.arithmetic.grids import expand, expand_grid, round_to_grid, weight_grid, weight_limits
from calib.errors import QuantizationError
from calib.schemes import LinearScheme, PerTensor, PerToken, TensorScheme
from calib.weights.rounded import row_errors

_LARGEST = 1e4
"""Scales are clamped to 1/_LARGEST ... _LARGEST, as ModelOpt does: beyond, the folded weights would
leave float16.
"""
_ALPHA_STEPS = 20


@dataclass(frozen=True)
class Chosen:
    """The outcome of a search."""

    scales: Tensor
    """``s [in]``, float64, positive."""
    setting: float | None
    """SmoothQuant's alpha or AWQ's ratio; ``None`` if not smoothing was best."""
    errors: Mapping[float | None, float] = field(default_factory=dict)
    """Mean squared output error of a token by candidate, ``None`` without smoothing; empty if
    nothing was searched.
    """

    @property
    def error_ratio(self) -> float | None:
        """The error over what it is without smoothing, at most 1; ``None`` if nothing was
        searched.
        """
        before = self.errors.get(None)
        return None if before is None else self.errors[self.setting] / before if before > 0 else 1.0


def reader_weight(weight: Tensor) -> Tensor:
    """The weight of a reader as ``[out, in]``, a view; the experts of a 3-D parameter one below the
    other.
    """
    return weight.reshape(-1, weight.shape[-1]) if weight.dim() == 3 else weight


def column_amax(weights: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of every column over several weights ``[out, in]``: float64
    ``[in]``.
    """
    return torch.stack([weight.abs().amax(dim=0).double() for weight in weights]).amax(dim=0)


def column_share(weights: Sequence[Tensor], schemes: Sequence[LinearScheme]) -> Tensor:
    """The mean over the rows of several weights of ``|W|`` in units of what shares a scale's amax:
    float64 ``[in]``.
    """
    total = torch.zeros(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    for weight, scheme in zip(weights, schemes, strict=True):
        low, high = weight_limits(weight.float(), scheme.weight.granularity)
        amax = expand(torch.maximum(low.abs(), high.abs()), weight.shape, scheme.weight.granularity)
        # A group of zeros has no share in anything.
        total += (weight.float().abs() / amax.clamp(min=torch.finfo(torch.float32).tiny)).sum(
            dim=0, dtype=torch.float64
        )
    return total / sum(weight.shape[0] for weight in weights)


def smoothquant_scales(amax_x: Tensor, amax_w: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's scale, not normalised: a common factor of all channels changes no rounding.

    Args:
        amax_x: largest magnitude of every input channel, ``[n]``.
        amax_w: largest magnitude of every column over all readers, ``[n]`` (:func:`column_amax`).
        alpha: 0 evens out the columns of the weights, 1 the inputs.

    Returns:
        float64 ``[n]``, within 1e-4 ... 1e4.

    Raises:
        QuantizationError: an amax holds NaN or Inf.
    """
    amax_x, amax_w = _finite("amax of the inputs", amax_x), _finite("amax of the weights", amax_w)
    scales = (amax_x**alpha / amax_w ** (1 - alpha)).clamp(1 / _LARGEST, _LARGEST)
    return torch.where((amax_x > 0) & (amax_w > 0), scales, torch.ones_like(scales))


def smoothquant_search(
    amax_x: Tensor,
    amax_w: Tensor,
    moment: Tensor,
    weights: Sequence[Tensor],
    schemes: Sequence[LinearScheme],
) -> Chosen:
    """SmoothQuant with the alpha, on a grid of 21, that has the least error of weights and inputs
    together.

    Args:
        amax_x: as for :func:`smoothquant_scales`, ``[in]``.
        amax_w: as for :func:`smoothquant_scales`, ``[in]``.
        moment: ``E[x^T x]``, ``[in, in]``.
        weights: the readers' weights ``[out, in]``.
        schemes: how each of them is quantized.
    """
    alphas = [step / _ALPHA_STEPS for step in range(_ALPHA_STEPS + 1)]
    candidates = ((alpha, smoothquant_scales(amax_x, amax_w, alpha)) for alpha in alphas)
    return _search(candidates, amax_x, moment, weights, schemes)


def awq_scales(
    mean_abs_x: Tensor,
    mean_w: Tensor,
    moment: Tensor,
    weights: Sequence[Tensor],
    schemes: Sequence[LinearScheme],
    *,
    grid: int = 20,
) -> Chosen:
    """AWQ's scale with the ratio, on a grid from 0 to 1, that has the least error of all readers'
    weights.

    Not smoothing is a candidate, so the result is never worse than that.

    Args:
        mean_abs_x: mean magnitude of every input channel, ``[in]``.
        mean_w: mean magnitude of every column, ``[in]`` (:func:`column_share`).
        moment: ``E[x^T x]``, ``[in, in]``.
        weights: the readers' weights ``[out, in]``.
        schemes: how each of them is quantized.
        grid: steps of the ratio.

    Raises:
        QuantizationError: a statistic holds NaN or Inf.
    """
    mean_abs_x, mean_w = (
        _finite("mean magnitude of the inputs", mean_abs_x),
        _finite("mean of the weights", mean_w),
    )
    candidates = (
        (step / grid, _awq_candidate(mean_abs_x, mean_w, step / grid)) for step in range(grid + 1)
    )
    return _search(candidates, None, moment, weights, schemes)


def _awq_candidate(mean_abs_x: Tensor, mean_w: Tensor, ratio: float) -> Tensor:
    used = (mean_abs_x > 0) & (mean_w > 0)
    scales = torch.ones_like(mean_abs_x)
    if bool(used.any()):
        found = (mean_abs_x[used] ** ratio / mean_w[used] ** (1 - ratio)).clamp(
            1 / _LARGEST, _LARGEST
        )
        scales[used] = found / (found.max() * found.min()).sqrt()
    return scales


def _search(
    candidates: Iterable[tuple[float, Tensor]],
    amax_x: Tensor | None,
    moment: Tensor,
    weights: Sequence[Tensor],
    schemes: Sequence[LinearScheme],
) -> Chosen:
    """The best of ``candidates`` and of not smoothing; with ``amax_x`` the inputs' rounding counts
    too.
    """
    moment = _finite("second moment of the inputs", moment).float()
    pairs = list(zip(weights, schemes, strict=True))
    nothing = torch.ones(moment.shape[0], dtype=torch.float64, device=moment.device)
    errors: dict[float | None, float] = {}
    best: tuple[float | None, Tensor] = (None, nothing)
    for setting, scales in [best, *candidates]:
        error = 0.0
        for weight, scheme in pairs:
            # In the dtype that the target computes in, like the scales of its grid.
            smoothed = (weight.float() * scales.float()).to(weight.dtype)
            error += _weight_error(smoothed, scales.float(), scheme.weight, moment)
            if amax_x is not None and scheme.input is not None:
                error += _input_error(smoothed, amax_x.double() / scales, scheme.input)
        errors[setting] = error
        if error < errors[best[0]]:
            best = (setting, scales)
    return Chosen(best[1], best[0], errors)


def _weight_error(smoothed: Tensor, scales: Tensor, scheme: TensorScheme, moment: Tensor) -> float:
    """``tr(dW H dW^T)`` of rounding ``smoothed = W s`` to nearest."""
    grid = weight_grid(smoothed, scheme, smoothed.dtype)
    scale, zero = expand_grid(grid, smoothed.shape, scheme.granularity)
    rounded = round_to_grid(smoothed.float(), scale, zero, scheme.format)
    return float(row_errors(smoothed / scales, rounded / scales, moment).sum())


def _input_error(smoothed: Tensor, amax: Tensor, scheme: TensorScheme) -> float:
    """``D^2 / 12 |W s|^2`` for integers with one scale over all channels; see the module's
    docstring.
    """
    if scheme.format.kind != "integer" or not isinstance(scheme.granularity, PerTensor | PerToken):
        return 0.0
    step = float(amax.max()) / scheme.format.maxbound
    return step**2 / 12 * float(smoothed.float().square().sum(dtype=torch.float64))


def _finite(what: str, values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise QuantizationError(
            f"the {what} holds NaN or Inf, and no smoothing scale follows from it"
        )
    return values.double()
