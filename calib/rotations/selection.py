"""The gate of one rotation: identity, Hadamard, PCA·Hadamard and the trained one, by the error of
what is exported.

Training can make a rotation worse, and rotating at all can. So the candidates are compared by what
quantization does to them, and the simplest of those that are within noise of the best is kept
(:mod:`calib.arithmetic.noise`): the identity before Hadamard before PCA·Hadamard before the trained
one. To first order the relative squared error of a linear's output is ``e_x + e_W``
(:mod:`calib.rotations.joint`), and those of the two that the scheme quantizes are counted:

* ``e_x``: of activations, on tokens that trained no candidate, in the shape in which the quantizer
  meets them. R2 is judged on whole inputs of the output projection, all heads side by side. Static
  quantizers get their limits from the tokens that rotations are trained on; one scale for the
  tensor stands for clusters of channels too.
* ``e_W``: of the rows of the weights that read the rotated space (:mod:`calib.rotations.readers`),
  each with its own scales. These are the numbers that are exported; there is nothing to hold out.

Either is a ratio of sums, whose units are tokens and weight rows. With the weight ``w_u`` of a unit
and the error ``l_u`` that it gets, it adds ``w_u l_u / sum_u w_u |x_u|^2``; the denominator is the
same for all rotations. R1 is one choice. R2 is one choice for all layers, by the mean over layers,
with the figure of every layer kept; its units are what stands at one place of the samples of all
layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from calib.arithmetic.grids import Grid, expand_grid, grid_of, round_to_grid, weight_grid
from calib.arithmetic.noise import Sample, margins, simplest
from calib.capture.result import Samples
from calib.errors import RotationError
from calib.rotations.objectives import whole_inputs
from calib.rotations.quantizer import ActivationScheme
from calib.rotations.starts import make_start
from calib.rotations.tokens import second_moment
from calib.schemes import PerBlock, PerChannel, PerToken, Scheme, TensorScheme

CandidateName = Literal["identity", "hadamard", "pca-hadamard", "trained"]


@dataclass(frozen=True)
class Judge:
    """What decides between the candidates of a rotation, and so what they are trained on."""

    measure: str
    """What is measured, in words for the table."""
    activations: TensorScheme | None
    """How activations are quantized; ``None``: they stay in float."""
    weights: TensorScheme | None = None
    """How weights are quantized, where their rows are judged."""
    rows: Mapping[str, Samples] = field(default_factory=dict)
    """Weight rows by rotation (``r1``, ``r2``) in the layout of samples; needed with ``weights``.
    """

    @property
    def trained_on(self) -> Literal["activations", "weights", "both"]:
        """What makes most of the error: the one with fewer bits; of equals both, but for
        activations with static limits, which lose far more than weights with a scale for every row.
        """
        if self.weights is None:
            return "activations"
        if self.activations is None or self.weights.format.bits < self.activations.format.bits:
            return "weights"
        equal = self.weights.format.bits == self.activations.format.bits
        return "both" if equal and self.activations.dynamic else "activations"

    @property
    def quantizer(self) -> ActivationScheme | None:
        """What rotations are trained for; see :func:`integer_quantizer`."""
        scheme = self.weights if self.trained_on == "weights" else self.activations
        return None if scheme is None else integer_quantizer(scheme)


@dataclass(frozen=True)
class CandidateError:
    """One candidate of one rotation, and the error it leaves."""

    rotation: str
    """``R1`` or ``R2``."""
    candidate: CandidateName
    error: float
    """Relative squared error; for R2 the mean over layers."""
    layers: tuple[float, ...]
    """R2: the error of every layer. R1: empty."""
    margin: float
    """The error above the lowest one."""
    margin_low: float
    """Ends of its interval (:mod:`calib.arithmetic.noise`)."""
    margin_high: float
    measure: str
    chosen: bool
    note: str = ""
    """What else there is to say of how it came about."""


@dataclass(frozen=True)
class Selection:
    """The outcome of one gate."""

    name: CandidateName
    matrix: Tensor | None
    """Float64 ``[*batch, n, n]``; ``None`` for the identity."""
    table: tuple[CandidateError, ...]


def judge_for(scheme: Scheme, rows: Mapping[str, Samples] | None = None) -> Judge:
    """The judge of ``scheme``: its activations, and the weight ``rows`` where they are given.

    Raises:
        RotationError: a weight-only scheme without ``rows``, or one that quantizes nothing.
    """
    if scheme.weight is None:
        raise RotationError(f"'{scheme.name}' quantizes nothing that rotations could be judged by")
    if rows is None and scheme.activation is None:
        raise RotationError(
            f"rotations for the weight-only scheme '{scheme.name}' are judged by weight rows"
        )
    parts = (
        []
        if scheme.activation is None
        else [f"held-out activations, {scheme.activation.format.name}"]
    )
    if rows is None:
        return Judge(parts[0], scheme.activation)
    return Judge(
        " + ".join([*parts, f"weight rows, {scheme.weight.format.name}"]),
        scheme.activation,
        scheme.weight,
        rows,
    )


def integer_quantizer(scheme: TensorScheme) -> ActivationScheme | None:
    """``scheme`` as rotations are trained for it; ``None`` for float formats.

    A weight's scale for each output channel is, for its rows, a scale for each token.
    """
    fmt = scheme.format
    if fmt.kind != "integer":
        return None
    match scheme.granularity:
        case PerBlock(size):
            return ActivationScheme(fmt.bits, scheme.symmetric, "group", size)
        case PerChannel() | PerToken():
            return ActivationScheme(fmt.bits, scheme.symmetric, "token")
        case _:
            return ActivationScheme(fmt.bits, scheme.symmetric, "tensor")


def candidates(
    trained: Tensor, train: Samples, *, seed: int, fix_ones: bool = False
) -> dict[CandidateName, Tensor | None]:
    """The matrices that are compared, the simplest first; ``None`` for the identity.

    Args:
        trained: float64 ``[n, n]`` or ``[layers, kv_heads, n, n]``.
        train: samples that the closed forms are computed from; see :func:`select`.
        seed: of the Hadamard signs.
        fix_ones: only rotations that fix the all-ones vector (LayerNorm models).
    """
    n = trained.shape[-1]
    weights = train.weights if trained.dim() == 2 else train.weights.unsqueeze(-2)
    moment = second_moment(train.values.float(), weights.expand(train.values.shape[:-1])).cpu()
    return {
        "identity": None,
        "hadamard": make_start("hadamard", n, seed=seed, moment=None, fix_ones=fix_ones),
        "pca-hadamard": make_start("pca-hadamard", n, seed=seed, moment=moment, fix_ones=fix_ones),
        "trained": trained,
    }


def select(
    rotation: Literal["r1", "r2"],
    trained: Tensor,
    train: Samples,
    held: Samples,
    judge: Judge,
    *,
    seed: int,
    fix_ones: bool = False,
) -> Selection:
    """Compare the candidates of one rotation and keep the simplest within noise of the best.

    Args:
        rotation: which one; names the rows of the table.
        trained: the trained candidate, float64 ``[n, n]`` or ``[layers, kv_heads, n, n]``.
        train: samples that closed forms and static limits are computed from: values ``[tokens, n]``
            for R1, ``[layers, kv_heads, tokens, n]`` for R2.
        held: samples of the same layout, disjoint from all that rotations were trained on.
        judge: what is quantized, and how.
        seed: of the Hadamard signs.
        fix_ones: only rotations that fix the all-ones vector (LayerNorm models).
    """
    matrices = candidates(trained, train, seed=seed, fix_ones=fix_ones)
    rows = None if judge.weights is None else judge.rows[rotation]
    parts = {name: _parts(matrix, train, held, rows, judge) for name, matrix in matrices.items()}
    errors = {
        name: torch.stack([part.sum(-1) for part in own]).sum(0) for name, own in parts.items()
    }
    compared = margins({name: _samples(own) for name, own in parts.items()})
    chosen = simplest(compared)
    table = tuple(
        CandidateError(
            rotation=rotation.upper(),
            candidate=name,
            error=float(error.mean()),
            layers=tuple(error.tolist()) if rotation == "r2" else (),
            margin=compared[name].value,
            margin_low=compared[name].low,
            margin_high=compared[name].high,
            measure=judge.measure,
            chosen=name == chosen,
        )
        for name, error in errors.items()
    )
    matrix = matrices[chosen]
    return Selection(chosen, matrix if matrix is None else matrix.expand(trained.shape), table)


def _parts(
    matrix: Tensor | None, train: Samples, held: Samples, rows: Samples | None, judge: Judge
) -> list[Tensor]:
    """``e_x`` and ``e_W`` as far as they are judged, by unit: float64 ``[layers, units]`` each; one
    layer for R1.
    """
    parts = []
    if judge.activations is not None:
        parts.append(unit_errors(matrix, held, judge.activations, train=train))
    if judge.weights is not None and rows is not None:
        parts.append(unit_errors(matrix, rows, judge.weights))
    return parts


def _samples(parts: Sequence[Tensor]) -> list[Sample]:
    """What each unit adds to the mean over layers."""
    return [Sample(part.mean(0).tolist()) for part in parts]


def relative_error(
    matrix: Tensor | None, samples: Samples, scheme: TensorScheme, *, train: Samples | None = None
) -> Tensor:
    """Relative squared error of rotated and quantized ``samples``, float64 ``[layers]``; one layer
    for R1. Arguments as for :func:`unit_errors`.
    """
    return unit_errors(matrix, samples, scheme, train=train).sum(-1)


def unit_errors(
    matrix: Tensor | None, samples: Samples, scheme: TensorScheme, *, train: Samples | None = None
) -> Tensor:
    """What each token, or row, adds to :func:`relative_error`, float64 ``[layers, units]``.

    Args:
        matrix: ``[n, n]``, or ``[layers, kv_heads, n, n]``; ``None``: the identity.
        samples: values ``[tokens, n]``, or ``[layers, kv_heads, tokens * group, n]``.
        scheme: the quantizer.
        train: samples of the same layout that static limits are taken from; by default ``samples``.
    """
    seen, weights = _seen(matrix, samples)
    calibrated = seen if train is None else _seen(matrix, train)[0]
    errors = []
    for x, limits, share in zip(seen, calibrated, weights, strict=True):
        lost = (_quantized(x, scheme, limits) - x).double().square().sum(-1) * share
        kept = (x.double().square().sum(-1) * share).sum()
        errors.append((lost / kept.clamp_min(torch.finfo(torch.float64).tiny)).cpu())
    return torch.stack(errors)


def _quantized(x: Tensor, scheme: TensorScheme, calibrated: Tensor) -> Tensor:
    """``x`` ``[tokens, channels]`` on its grid; static limits are those of ``calibrated``."""
    match scheme.granularity:
        case PerToken() | PerChannel():
            scheme = replace(scheme, granularity=PerChannel(0))
            grid: Grid = weight_grid(x, scheme)
        case PerBlock():
            grid = weight_grid(x, scheme)
        case _:
            grid = grid_of(*torch.aminmax(calibrated), scheme)
            return round_to_grid(x, grid.scale, grid.zero_point, scheme.format)
    return round_to_grid(x, *expand_grid(grid, x.shape, scheme.granularity), scheme.format)


def _seen(matrix: Tensor | None, samples: Samples) -> tuple[Tensor, Tensor]:
    """Rotated samples as the tensor that a quantizer meets, ``[layers, tokens, channels]``, and
    weights ``[layers, tokens]``. The channels of R2 are those of all query heads, which one
    quantizer covers.
    """
    values = samples.values.float()
    rotated = values if matrix is None else values @ matrix.to(values)
    if rotated.dim() == 2:
        return rotated.unsqueeze(0), samples.weights.to(values).unsqueeze(0)
    return whole_inputs(rotated, samples.group), samples.weights.to(values)[:, :: samples.group]
