"""Hadamard matrices of every order that models use, as short Kronecker products of +-1 factors.

``H`` of order ``n`` has entries +-1 and ``H H^T = n I``, so ``H / sqrt(n)`` is orthonormal with all
entries of equal size: the rotation that spreads one outlier evenly over all channels. If ``H1`` and
``H2`` are Hadamard so is ``H1 x H2``, and applying the product costs ``n1 + n2`` multiplications a
channel instead of ``n1 n2``. Factors are Sylvester (powers of two) and Paley matrices. Where no
Hadamard matrix of order ``n`` is reachable the largest one whose order divides ``n`` is repeated
along the diagonal.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calib.errors import RotationError
from calib.rotations.paley import Signs, is_paley_order, paley_matrix

_LARGEST_SYLVESTER_FACTOR = 64
# One more factor is one more pass over the activations and two more nodes in every exported graph.
# It has to save at least this many multiplications a channel: on every device that runs these
# models memory is the scarcer resource.
_COST_OF_A_FACTOR = 64


@lru_cache(maxsize=256)
def factor_order(n: int) -> tuple[int, ...] | None:
    """Orders whose Kronecker product is ``n``, or ``None`` where no Hadamard matrix of order ``n``
    is reachable.

    Each is a power of two of at most 64 or the order of a Paley matrix. Among all such products the
    cheapest one for :func:`apply_hadamard` is returned, largest factor first: the sum of the orders
    (multiplications per channel) plus 64 for every factor (a pass over the activations).

    Raises:
        RotationError: ``n`` is not positive.
    """
    if n < 1:
        raise RotationError(
            f"there is no Hadamard matrix of order {n}", hint="pass a positive number of channels"
        )
    if n & (n - 1) == 0:
        return _split_power_of_two(n)
    candidates: list[tuple[int, ...]] = []
    for base in _divisors(n):
        if _odd_part(base) > 1 and is_paley_order(base):
            rest = factor_order(n // base)
            if rest is not None:
                candidates.append(tuple(sorted((base, *(f for f in rest if f > 1)), reverse=True)))
    return min(
        candidates,
        key=lambda orders: (sum(orders) + _COST_OF_A_FACTOR * len(orders), orders),
        default=None,
    )


def block_order(n: int) -> int:
    """The largest order that divides ``n`` and has a reachable Hadamard matrix; ``n`` itself where
    it has one.

    Raises:
        RotationError: ``n`` is not positive.
    """
    if factor_order(n) is not None:  # also rejects n < 1
        return n
    return next(d for d in reversed(_divisors(n)) if factor_order(d) is not None)


def hadamard_factors(n: int) -> tuple[Tensor, ...]:
    """The int8 +-1 matrices, in the order of :func:`factor_order`, whose Kronecker product has ``H
    H^T = n I`` exactly.

    Raises:
        RotationError: no Hadamard matrix of order ``n`` is reachable.
    """
    orders = factor_order(n)
    if orders is None:
        raise RotationError(
            f"no Hadamard matrix of order {n} can be built from Sylvester and Paley factors",
            hint=(
                f"use the block-diagonal form: {n // block_order(n)} blocks of order"
                f" {block_order(n)}"
            ),
        )
    return tuple(torch.tensor(_base_matrix(order)) for order in orders)


def random_signs(n: int, seed: int) -> Tensor:
    """The +-1 vector ``[n]`` (float64) that ``hadamard_matrix(n, seed=seed)`` multiplies the rows
    by.

    The bits come from numpy's PCG64 stream, which numpy guarantees never to change: a manifest that
    records only order and seed names the same matrix under every version of torch.

    Raises:
        RotationError: ``seed`` is negative.
    """
    return torch.tensor(_signs(n, seed))


def hadamard_matrix(
    n: int,
    *,
    seed: int | None = None,
    block: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The orthonormal ``[n, n]`` matrix ``diag(signs) (I x H) / sqrt(b)``, with ``H`` of order
    ``b``.

    Args:
        n: number of channels.
        seed: seed of :func:`random_signs`; ``None`` for no signs.
        block: ``b``, which divides ``n``; ``None``: :func:`block_order`.
        dtype: dtype of the result. The entries are 0 or one number of either sign, rounded once.

    Raises:
        RotationError: ``n`` is not positive, ``seed`` is negative, or there is no such ``block``.
    """
    block = _block(n, block)
    matrix = torch.eye(n // block, dtype=torch.float64)
    for factor in hadamard_factors(block):
        matrix = torch.kron(matrix, factor.double())
    matrix *= block**-0.5
    if seed is not None:
        matrix *= random_signs(n, seed)[:, None]
    return matrix.to(dtype)


def apply_hadamard(
    x: Tensor, *, seed: int | None = None, block: int | None = None, transposed: bool = False
) -> Tensor:
    """``x @ hadamard_matrix(n, seed=seed, block=block)`` over the last dimension, by one reshape
    and one matmul per factor.

    With channels indexed by a tuple of factor indices, ``x (H1 x H2)`` contracts each index with
    its own factor. Only static channel counts enter the shapes, so ``torch.export`` traces it with
    any dynamic leading dimensions.

    Args:
        x: floating tensor ``[..., n]``.
        seed: seed of :func:`random_signs`; ``None`` for no signs.
        block: as for :func:`hadamard_matrix`.
        transposed: multiply by the transpose instead, which is the inverse.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        RotationError: ``x`` is not floating, has no last dimension, ``seed`` is negative, or there
            is no such ``block``.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise RotationError(
            f"a Hadamard rotation needs a floating tensor [..., channels], not {x.dtype}"
            f" {tuple(x.shape)}",
            hint="pass activations with channels last",
        )

    n = x.shape[-1]
    leading = x.shape[:-1]
    signs = None
    if seed is not None:
        signs = torch.tensor(_signs(n, seed), dtype=x.dtype, device=x.device)
    if signs is not None and not transposed:
        x = x * signs
    block = _block(n, block)
    done, rest = n // block, block
    for order in factor_order(block) or ():
        rest //= order
        # Scaling each factor keeps every intermediate at the size of x, which matters in float16.
        # Built by numpy in the final dtype, each is one constant of a traced graph and not a chain
        # of casts.
        scaled = _base_matrix(order) * order**-0.5
        scaled = scaled.T if transposed else scaled
        if rest == 1:
            x = x.reshape(*leading, done, order) @ torch.tensor(
                scaled, dtype=x.dtype, device=x.device
            )
        else:
            x = torch.tensor(scaled.T, dtype=x.dtype, device=x.device) @ x.reshape(
                *leading, done, order, rest
            )
        done *= order
    x = x.reshape(*leading, n)
    return x if signs is None or not transposed else x * signs


def _block(n: int, asked: int | None) -> int:
    if asked is None:
        return block_order(n)
    if n % asked or factor_order(asked) is None:
        raise RotationError(
            f"{n} channels have no Hadamard matrix in blocks of {asked}",
            hint="give a power of two that divides them",
        )
    return asked


def _signs(n: int, seed: int) -> npt.NDArray[np.float64]:
    if seed < 0:
        raise RotationError(f"seed {seed} is negative", hint="pass a seed of 0 or more")
    words = np.random.PCG64(seed).random_raw(n)
    # The top bit: the high bits of a PCG64 word are the best mixed.
    return 1.0 - 2.0 * (words >> np.uint64(63)).astype(np.float64)


def _base_matrix(order: int) -> Signs:
    return _sylvester(order) if order & (order - 1) == 0 else paley_matrix(order)


def _sylvester(order: int) -> Signs:
    matrix = np.ones((1, 1), dtype=np.int8)
    while matrix.shape[0] < order:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], dtype=np.int8))
    return matrix


def _split_power_of_two(n: int) -> tuple[int, ...]:
    """Powers of two with product ``n``: as few as the largest allowed factor permits, as equal as
    possible.
    """
    exponent = n.bit_length() - 1
    count = max(1, -(-exponent // (_LARGEST_SYLVESTER_FACTOR.bit_length() - 1)))
    return tuple(2 ** ((exponent + i) // count) for i in reversed(range(count)))


def _odd_part(n: int) -> int:
    return n // (n & -n)


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
