"""The gate of one rotation: identity, Hadamard, PCA·Hadamard and the trained one, by the error of what is exported.

Training can make a rotation worse, and rotating at all can. So the candidates are compared by the relative squared
error of the quantizer that will be exported, on tokens that trained none of them, and the best one is kept; of equals
the simplest. What is quantized depends on the scheme:

* With quantized activations, the activations: those sampled while capturing, in the shape in which the quantizer meets
  them. R2 is judged on whole inputs of the output projection, all heads side by side. A static per-tensor quantizer
  gets its limits from the tokens that rotations are trained on.
* With weights alone quantized, the rows of the weights that read the rotated space (:mod:`calib.rotations.readers`),
  each with its own scales. These are the numbers that are exported; there is nothing to hold out. The error of the
  outputs, ``|x dW^T|``, would need each layer's own activations, and R1's samples are pooled over layers.

R1 is one choice. R2 is one choice for all layers, by the mean over layers, with the figure of every layer kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calib.capture.result import Samples
from calib.errors import RotationError
from calib.rotations.objectives import ActivationScheme, scheme_error
from calib.rotations.starts import make_start
from calib.rotations.train import second_moment
from calib.scales import convert_to_scale, fake_quantize
from calib.schemes import NumberFormat, PerBlock, PerChannel, Scheme, TensorScheme

CandidateName = Literal["identity", "hadamard", "pca-hadamard", "trained"]
Quantizer = ActivationScheme | NumberFormat


@dataclass(frozen=True)
class Judge:
    """What decides between the candidates of a rotation."""

    quantizer: Quantizer
    """An integer quantizer, or a float format with one static scale for the whole tensor."""
    measure: str
    """What is measured, in words for the table."""
    rows: Mapping[str, Samples] | None = None
    """Weight rows by rotation (``r1``, ``r2``) in the layout of samples, where the weights alone are quantized."""


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
    measure: str
    chosen: bool


@dataclass(frozen=True)
class Selection:
    """The outcome of one gate."""

    name: CandidateName
    matrix: Tensor | None
    """Float64 ``[*batch, n, n]``; ``None`` for the identity."""
    table: tuple[CandidateError, ...]


def judge_for(scheme: Scheme, rows: Mapping[str, Samples] | None = None) -> Judge:
    """The judge of ``scheme``: its activations, or the weight ``rows`` where it leaves activations in float.

    Raises:
        RotationError: a weight-only scheme without ``rows``.
    """
    if scheme.activation is not None:
        return Judge(_quantizer(scheme.activation), f"held-out activations, {scheme.activation.format.name}")
    if rows is None:
        raise RotationError(f"rotations for the weight-only scheme '{scheme.name}' are judged by weight rows")
    return Judge(_quantizer(scheme.weight), f"weight rows, {scheme.weight.format.name}", rows)


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
    """Compare the candidates of one rotation and keep the best.

    Args:
        rotation: which one; names the rows of the table.
        trained: the trained candidate, float64 ``[n, n]`` or ``[layers, kv_heads, n, n]``.
        train: samples that closed forms and static limits are computed from: values ``[tokens, n]`` for R1, ``[layers,
            kv_heads, tokens, n]`` for R2.
        held: samples of the same layout, disjoint from all that rotations were trained on.
        judge: what is quantized, and how.
        seed: of the Hadamard signs.
        fix_ones: only rotations that fix the all-ones vector (LayerNorm models).
    """
    matrices = candidates(trained, train, seed=seed, fix_ones=fix_ones)
    if judge.rows is not None:
        train = held = judge.rows[rotation]
    errors = {name: _error(matrix, train, held, judge.quantizer) for name, matrix in matrices.items()}
    best = min(errors, key=lambda name: float(errors[name].mean()))
    table = tuple(
        CandidateError(
            rotation=rotation.upper(),
            candidate=name,
            error=float(error.mean()),
            layers=tuple(error.tolist()) if rotation == "r2" else (),
            measure=judge.measure,
            chosen=name == best,
        )
        for name, error in errors.items()
    )
    matrix = matrices[best]
    return Selection(best, matrix if matrix is None else matrix.expand(trained.shape), table)


def _error(matrix: Tensor | None, train: Samples, held: Samples, quantizer: Quantizer) -> Tensor:
    """Relative squared error of ``held`` rotated and quantized, float64 ``[layers]``; one layer for R1."""
    seen, weights = _seen(matrix, held)
    static = isinstance(quantizer, NumberFormat) or quantizer.granularity == "tensor"
    limits = None
    if static:
        calibrated, _ = _seen(matrix, train)
        limits = (calibrated.amin((-1, -2)), calibrated.amax((-1, -2)))
    if isinstance(quantizer, ActivationScheme):
        if limits is not None:  # [layers] to what broadcasts against [layers, tokens, groups, channels]
            limits = (limits[0][:, None, None, None], limits[1][:, None, None, None])
        return scheme_error(seen, quantizer, weights=weights, limits=limits).cpu()
    assert limits is not None  # a float format is static
    amax = torch.maximum(limits[0].abs(), limits[1].abs())
    scales = convert_to_scale(amax, quantizer.maxbound).reshape(-1)
    layers = zip(seen, weights, scales, strict=True)
    return torch.stack([_float_error(x, w, scale, quantizer) for x, w, scale in layers])


def _float_error(x: Tensor, weights: Tensor, scale: Tensor, quantizer: NumberFormat) -> Tensor:
    lost = ((fake_quantize(x, scale, quantizer) - x).double().square().sum(-1) * weights).sum()
    kept = (x.double().square().sum(-1) * weights).sum()
    return (lost / kept.clamp_min(torch.finfo(torch.float64).tiny)).cpu()


def _seen(matrix: Tensor | None, samples: Samples) -> tuple[Tensor, Tensor]:
    """Rotated samples as the tensor that a quantizer meets, ``[layers, tokens, channels]``, and weights ``[layers,
    tokens]``. The channels of R2 are those of all query heads, which one quantizer covers.
    """
    values = samples.values.float()
    rotated = values if matrix is None else values @ matrix.to(values)
    if rotated.dim() == 2:
        return rotated.unsqueeze(0), samples.weights.to(values).unsqueeze(0)
    layers, heads, entries, n = rotated.shape
    tokens = entries // samples.group
    split = rotated.reshape(layers, heads, tokens, samples.group, n).permute(0, 2, 1, 3, 4)
    return split.reshape(layers, tokens, -1), samples.weights.to(values)[:, :: samples.group]


def _quantizer(scheme: TensorScheme) -> Quantizer:
    if scheme.format.kind == "float":
        return scheme.format
    match scheme.granularity:
        case PerBlock(size):
            return ActivationScheme(scheme.format.bits, granularity="group", group_size=size)
        case PerChannel():  # of a weight: one scale a row
            return ActivationScheme(scheme.format.bits, granularity="token")
        case _:
            return ActivationScheme(scheme.format.bits, granularity="tensor")
