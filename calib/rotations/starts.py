"""Starting points for training, each also a rotation in its own right, in float64.

Rows are tokens: an activation ``x`` becomes ``x R``. With ``M = E[x^T x] = V diag(lambda) V^T`` the
second moment, ``x V`` has uncorrelated channels of power ``lambda``, and ``x V H`` with ``H`` an
orthonormal Hadamard matrix gives every channel the same power, ``trace(M) / n``.

Models with LayerNorm take only rotations that fix the all-ones vector, since these alone commute
with the centring. With ``O = [1/sqrt(n), U]`` orthogonal, ``U`` a basis of the complement of ones,
they are exactly ``U Q' U^T + 1 1^T / n`` for an orthogonal ``Q'`` of order ``n - 1``.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from calib.errors import RotationError
from calib.rotations.hadamard import hadamard_matrix
from calib.rotations.polar import eigh

StartName = Literal["identity", "random", "hadamard", "pca-hadamard", "pca-ones"]
START_NAMES: tuple[str, ...] = get_args(StartName)


def identity_start(n: int) -> Tensor:
    """The identity ``[n, n]``: no rotation."""
    return torch.eye(n, dtype=torch.float64)


def haar_start(n: int, seed: int, *, fix_ones: bool = False) -> Tensor:
    """An orthogonal ``[n, n]`` matrix drawn uniformly (from those that fix ones with ``fix_ones``).

    The Q of a Gaussian matrix is uniform once the signs of R's diagonal are moved into it: F.
    Mezzadri, "How to generate random matrices from the classical compact groups", 2007.
    """
    order = n - 1 if fix_ones else n
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))
    matrix = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return embed_fixing_ones(matrix) if fix_ones else matrix


def hadamard_start(n: int, seed: int | None, *, fix_ones: bool = False) -> Tensor:
    """The random Hadamard matrix ``H`` ``[n, n]``; with ``fix_ones``, ``H (I - 2 u^T u)``.

    ``1 H`` and ``1`` have equal length, so the reflection along ``u = (1 H - 1) / |1 H - 1|``
    carries the one into the other: ``1 H (I - 2 u^T u) = 1``. As the product is orthogonal it fixes
    ones as a column too. A reflection of rank one changes few entries much: the median stays within
    10 % of ``1 / sqrt(n)``.
    """
    matrix = hadamard_matrix(n, seed=seed)
    if not fix_ones:
        return matrix
    ones = torch.ones(n, dtype=torch.float64)
    return _reflect_columns(matrix, ones @ matrix, ones)


def pca_hadamard_start(moment: Tensor, seed: int, *, fix_ones: bool = False) -> Tensor:
    """``V H``: principal axes, then a Hadamard matrix, so that every channel carries the same
    power.

    With ``fix_ones``: principal axes of the complement of ones, ``W = [1/sqrt(n), U V']``, then
    ``H`` with its first row made ``1/sqrt(n)``. Then ``1 W H = sqrt(n) e_1 H = 1``, and each of the
    other axes still meets one row of ``H``.

    Args:
        moment: second moment ``E[x^T x]`` ``[*batch, n, n]``; any positive multiple will do.
        seed: seed of the Hadamard signs; the same for the whole batch.
        fix_ones: restrict to rotations that fix the all-ones vector.

    Returns:
        An orthogonal float64 tensor of the shape of ``moment``.

    Raises:
        RotationError: ``moment`` is not square or not finite.
    """
    n = _checked_order(moment)
    if not fix_ones:
        return _principal_axes(moment) @ hadamard_matrix(n, seed=seed)
    basis = ones_complement(n)
    axes = basis @ _principal_axes(basis.T @ moment.double() @ basis)
    constant = torch.full((*axes.shape[:-1], 1), n**-0.5, dtype=torch.float64)
    return torch.cat([constant, axes], dim=-1) @ _first_row_constant(n, seed)


def pca_ones_start(moment: Tensor, seed: int) -> Tensor:
    """``V H`` with the first row of ``H`` made constant, so that the top principal axis goes to the
    all-ones vector.

    What all channels of a token share is a shift of the whole token: an asymmetric per-token
    quantizer absorbs it in the zero point, and the range that is left to cover is the smaller by
    it.

    Args:
        moment: second moment ``E[x^T x]`` ``[*batch, n, n]``.
        seed: seed of the Hadamard signs.

    Returns:
        An orthogonal float64 tensor of the shape of ``moment``.

    Raises:
        RotationError: ``moment`` is not square or not finite.
    """
    n = _checked_order(moment)
    return _principal_axes(moment) @ _first_row_constant(n, seed)


def ones_complement(n: int) -> Tensor:
    """An orthonormal basis ``U`` ``[n, n - 1]`` (float64) of the vectors whose entries sum to zero.

    The reflection along ``v = e_1 - 1/sqrt(n)`` carries ``e_1`` to ``1/sqrt(n)``, hence its other
    columns to the complement.
    """
    if n < 2:
        raise RotationError(
            f"a rotation of {n} channel that fixes the all-ones vector is the identity",
            hint="turn this rotation off",
        )
    constant = torch.full((n,), n**-0.5, dtype=torch.float64)
    first = torch.zeros(n, dtype=torch.float64)
    first[0] = 1.0
    return _reflect_columns(identity_start(n), first, constant)[:, 1:]


def embed_fixing_ones(inner: Tensor) -> Tensor:
    """``U Q' U^T + 1 1^T / n``: the rotation of order ``n`` that fixes ones and acts as ``inner``
    on the complement.

    Args:
        inner: orthogonal ``Q'`` ``[*batch, n - 1, n - 1]``.

    Returns:
        A float64 tensor ``[*batch, n, n]``.
    """
    n = inner.shape[-1] + 1
    basis = ones_complement(n)
    return basis @ inner.double() @ basis.T + 1.0 / n


def restrict_to_complement(matrix: Tensor) -> Tensor:
    """``U^T R U``: the inverse of :func:`embed_fixing_ones` for an ``R`` ``[*batch, n, n]`` that
    fixes ones.
    """
    basis = ones_complement(matrix.shape[-1])
    return basis.T @ matrix.double() @ basis


def make_start(
    name: StartName, n: int, *, seed: int, moment: Tensor | None, fix_ones: bool = False
) -> Tensor:
    """The start called ``name``, float64 ``[n, n]``, or ``[*batch, n, n]`` where it depends on
    ``moment``.

    Args:
        name: one of :data:`START_NAMES`.
        n: number of channels.
        seed: seed of whatever is random in it.
        moment: second moment ``[*batch, n, n]``; needed by the ``pca`` starts only.
        fix_ones: only rotations that fix the all-ones vector.

    Raises:
        RotationError: unknown name, no moment where one is needed, or ``pca-ones`` together with
            ``fix_ones``.
    """
    if name not in START_NAMES:
        raise RotationError(f"unknown start {name!r}", hint=f"use one of: {', '.join(START_NAMES)}")
    if name == "identity":
        return identity_start(n)
    if name == "random":
        return haar_start(n, seed, fix_ones=fix_ones)
    if name == "hadamard":
        return hadamard_start(n, seed, fix_ones=fix_ones)
    if moment is None:
        raise RotationError(
            f"start {name!r} needs the second moment of the activations",
            hint="use start 'hadamard'",
        )
    if name == "pca-hadamard":
        return pca_hadamard_start(moment, seed, fix_ones=fix_ones)
    if fix_ones:
        raise RotationError(
            "start 'pca-ones' sends a principal axis to the all-ones vector, which a LayerNorm"
            " model must keep fixed",
            hint="use start 'pca-hadamard'",
        )

    return pca_ones_start(moment, seed)


def _first_row_constant(n: int, seed: int) -> Tensor:
    """An orthonormal matrix that spreads like a Hadamard matrix and whose first row is
    ``1/sqrt(n)`` throughout.

    Where the first row has no zero, flipping column signs is enough and all entries keep one size;
    in block-diagonal form it has, and a reflection of the columns moves it.
    """
    matrix = hadamard_matrix(n, seed=seed)
    if bool((matrix[0] != 0).all()):
        return matrix * matrix[0].sign()
    return _reflect_columns(matrix, matrix[0], torch.full((n,), n**-0.5, dtype=torch.float64))


def _reflect_columns(matrix: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """``matrix (I - 2 u^T u)`` with ``u`` along ``source - target``: rows equal to ``source``
    become ``target``.
    """
    u = source - target
    length = torch.linalg.vector_norm(u)
    if length <= 1e-12 * torch.linalg.vector_norm(target):  # already there, to float64 rounding
        return matrix
    u = u / length
    return matrix - 2.0 * torch.outer(matrix @ u, u)


def _principal_axes(moment: Tensor) -> Tensor:
    """Eigenvectors ``V`` of ``moment``, largest eigenvalue first, each with its largest entry
    positive.

    LAPACK leaves the sign of an eigenvector free; fixing it makes the result the same on every
    machine with the same eigenvectors.
    """
    ascending: Tensor = eigh(moment.double())[1]
    axes = ascending.flip(-1)
    largest = axes.gather(-2, axes.abs().argmax(dim=-2, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0)


def _checked_order(moment: Tensor) -> int:
    if moment.dim() < 2 or moment.shape[-1] != moment.shape[-2]:
        raise RotationError(
            f"a second moment is square, not {tuple(moment.shape)}",
            hint="pass [*batch, channels, channels]",
        )
    if not bool(torch.isfinite(moment).all()):
        raise RotationError(
            "the second moment holds NaN or Inf",
            hint="look for the layer that overflows: rotq stats",
        )
    return int(moment.shape[-1])
