"""The polar factor: the orthogonal matrix nearest to a given one, by matmuls only.

For ``A = U S V^T`` the polar factor is ``U V^T``. It maximises ``<Q, A>`` over orthogonal ``Q``
(orthogonal Procrustes), which makes it both the projection onto the orthogonal group and the exact
solution of a linearised loss.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from calib.errors import RotationError
from calib.process.ambient import one_thread

# Margin on the power method's estimate of the largest singular value, which is low by at most some
# 10 % after 8 rounds on a flat spectrum (error about log(n) / (4 rounds)) and exact on a peaked
# one.
_NORM_MARGIN = 1.2
_NORM_ROUNDS, _NORM_STARTS = 8, 8
_LARGEST_ALONE = 1024


def newton_schulz(
    a: Tensor,
    *,
    least: float,
    tolerance: float,
    norm: Tensor | None = None,
    max_iterations: int = 40,
) -> Tensor:
    """Polar factor of ``a`` by the scaled Newton-Schulz iteration; two matmuls an iteration,
    batched, on any device.

    The cubic ``X <- X (3 I - c^2 X^T X) c / 2`` maps each singular value ``s`` to ``c s (3 - c^2
    s^2) / 2`` and keeps the singular vectors. The map peaks at 1. If they lie in ``[l, 1]``, ``c^2
    = 3 / (1 + l + l^2)`` sends both ends to the new lower bound, which is 2.6 times the old one
    while ``l`` is small, against 1.5 for the unscaled ``c = 1``. (Chen and Chow, "A stable scaling
    of Newton-Schulz for improving the sign function computation of a Hermitian matrix", 2014.)

    Args:
        a: ``[*batch, n, n]`` in a floating dtype; not singular.
        least: assumed lower bound of smallest over largest singular value. Smaller ones still
            converge, more slowly.
        tolerance: stop when every entry of ``X^T X - I`` is below this.
        norm: the largest singular value ``[*batch, 1, 1]`` or up to a fifth less, where the caller
            knows it.
        max_iterations: stop here in any case; singular values below about ``1.5 **
            -max_iterations`` are then left
        short.

    Returns:
        A tensor like ``a``, orthogonal to ``tolerance`` unless ``max_iterations`` was reached.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    x = a / (spectral_norm(a) if norm is None else norm).clamp_min(torch.finfo(a.dtype).tiny)
    for _ in range(max_iterations):
        gram = x.mT @ x
        if float((gram - eye).abs().max()) <= tolerance:
            break
        c = math.sqrt(3.0 / (1.0 + least + least * least))
        x = (0.5 * c) * (x @ torch.sub(3.0 * eye, gram, alpha=c * c))
        least = 0.5 * c * least * (3.0 - c * c * least * least)
    return x


def polar_factor(a: Tensor, *, tolerance: float) -> Tensor:
    """Polar factor of ``a`` ``[*batch, n, n]``, orthogonal up to a root mean square of
    ``tolerance`` of ``s^2 - 1``.

    On a CPU ``A (A^T A)^(-1/2)`` by one symmetric eigendecomposition costs about 7 matmuls, where
    Newton-Schulz takes 20 to 25 for the ill-conditioned matrices of real activations. Squaring the
    condition number costs accuracy in the weakest directions, those that ``<Q, A>`` hardly depends
    on; where that is too much, unscaled iterations repair it. On a GPU, where a decomposition costs
    hundreds of matmuls, Newton-Schulz does it all.
    """
    # |E| <= n max |E_ij|, so the root mean square |E| / sqrt(n) is below
    entry = tolerance / math.sqrt(a.shape[-1])
    if a.device.type != "cpu":
        return newton_schulz(a, least=1e-3, tolerance=entry)
    power, axes = eigh(a.mT @ a)
    largest = power[..., -1:].clamp_min(torch.finfo(a.dtype).tiny)
    # Eigenvalues below the rounding of the largest are noise; those directions come out short and
    # are finished below.
    root = power.clamp_min(torch.finfo(a.dtype).eps * largest).rsqrt()
    x: Tensor = a @ ((axes * root.unsqueeze(-2)) @ axes.mT)
    if _deviation(x) <= tolerance:
        return x

    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(3):
        gram = x.mT @ x
        distance = float((gram - eye).abs().max())
        if distance <= entry:
            return x
        if distance > 0.1:
            break
        x = 0.5 * (x @ (3.0 * eye - gram))
    return newton_schulz(x, least=0.1, tolerance=entry)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[*batch, n]``, ascending, and eigenvectors ``[*batch, n, n]`` of symmetric
    matrices, the same whatever the number of threads is, up to order 1024.

    There one thread takes a tenth of a second. Beyond, several are worth more than equal bits.
    """
    with one_thread() if matrix.shape[-1] <= _LARGEST_ALONE else nullcontext():
        values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _deviation(x: Tensor) -> float:
    """Root mean square of ``s^2 - 1`` over singular values, the greatest of the batch, estimated by
    8 random vectors.

    For ``E = X^T X - I`` and a vector ``v`` of independent standard normal entries, ``|E v|^2`` has
    the mean ``|E|^2``: two thin products in place of a matmul (Girard, Hutchinson).
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape[-1], 8, generator=generator, dtype=torch.float64).to(x)
    lost = torch.linalg.matrix_norm(x.mT @ (x @ v) - v)
    return float(lost.max()) / math.sqrt(v.numel())


def spectral_norm(a: Tensor, *, margin: float = _NORM_MARGIN) -> Tensor:
    """An upper estimate ``[*batch, 1, 1]`` of the largest singular value: the power method from
    several random vectors, the largest of what they find, times ``margin``.

    One vector alone may begin so nearly orthogonal to the direction that it looks for that it falls
    short of it by more than the margin, and an iteration that is scaled by too little flips that
    direction.
    """
    generator = torch.Generator().manual_seed(0)
    v = (
        torch.randn(a.shape[-1], _NORM_STARTS, generator=generator, dtype=torch.float64)
        .to(a)
        .expand(*a.shape[:-2], -1, _NORM_STARTS)
    )
    for _ in range(_NORM_ROUNDS):
        v = a.mT @ (a @ v)
        norm = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        v = v / norm.clamp_min(torch.finfo(a.dtype).tiny)
    estimate: Tensor = torch.linalg.vector_norm(a @ v, dim=-2, keepdim=True)
    return margin * estimate.amax(dim=-1, keepdim=True)


def project_orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix in float64, ``|X^T X - I| <= 1e-13`` an entry.

    With ``E = X^T X - I`` it is ``X (I + E)^(-1/2) = X (I - E / 2 + 3 E^2 / 8 - ...)``. Near the
    group (training ends there) these terms leave ``5 E^3 / 8`` of ``E``; farther away, or where
    that does not converge, an SVD does it. Not a QR: that would flip signs, and break a rotation
    that fixes ones. A float32 matrix is known to float32 only, so its first round is in float32.

    Args:
        matrix: ``[*batch, n, n]``.

    Returns:
        A float64 tensor ``[*batch, n, n]``.

    Raises:
        RotationError: ``matrix`` holds NaN or Inf.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise RotationError(
            "the rotation holds NaN or Inf", hint="lower the learning rate or check the activations"
        )

    x = matrix if matrix.dtype == torch.float32 else matrix.double()
    for _ in range(6):
        residual = x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        size = float(spectral_norm(residual).max())
        if size > 0.5:  # converges below 1; an SVD costs as much as many rounds
            break
        exact = x.dtype == torch.float64
        # |E^3| an entry: row by row, with |E e_i|^2 |E|.
        left = 0.625 * size * float(torch.linalg.vector_norm(residual, dim=-1).max()) ** 2
        # E^2 is small: float32 leaves a float64 sum of the terms exact to 1e-13
        half = residual.float()
        x = x - x @ (0.5 * residual - 0.375 * (half @ half).to(x.dtype))
        if exact and left <= 1e-14:
            return x
        x = x.double()
    else:
        return x
    u, _, vh = torch.linalg.svd(matrix.double())
    nearest: Tensor = u @ vh
    return nearest
