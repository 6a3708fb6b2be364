"""Paley's Hadamard matrices, built from finite-field arithmetic in integers.

For an odd prime power ``q`` let ``chi`` be the quadratic character of the field ``GF(q)`` (0 at
zero, +1 at squares, -1 elsewhere) and ``Q[a, b] = chi(a - b)``. Then ``Q Q^T = q I - J`` and ``Q J
= 0``, from which (R.E.A.C. Paley, "On orthogonal matrices", 1933):

* type I, ``q = 3 mod 4``: ``Q`` is skew, and ``I + [[0, 1], [-1, Q]]`` is a Hadamard matrix of
  order ``q + 1``;
* type II, ``q = 1 mod 4``: ``Q`` is symmetric, ``C = [[0, 1], [1, Q]]`` has ``C C^T = q I``, and
  ``C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]`` is a Hadamard matrix of order ``2 (q + 1)``.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

Signs = npt.NDArray[np.int8]


def prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``p`` prime and ``p ** k == q``, or ``None`` where ``q`` is no prime
    power.
    """
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        k, rest = k + 1, rest // p
    return (p, k) if rest == 1 else None


def is_paley_order(n: int) -> bool:
    """Whether Paley's type I or type II construction gives a Hadamard matrix of order ``n``."""
    return n % 4 == 0 and (prime_power(n - 1) is not None or _type_two_field(n) is not None)


@lru_cache(maxsize=32)
def paley_matrix(n: int) -> Signs:
    """A ``[n, n]`` matrix of +-1 with ``H H^T = n I``; ``n`` must satisfy :func:`is_paley_order`.
    Read-only: cached.
    """
    q = n - 1 if prime_power(n - 1) else _type_two_field(n)
    if q is None:
        raise ValueError(f"{n} is not the order of a Paley matrix")
    core = np.zeros((q + 1, q + 1), dtype=np.int8)
    core[0, 1:] = 1
    core[1:, 0] = -1 if q % 4 == 3 else 1
    core[1:, 1:] = _jacobsthal(q)
    eye = np.eye(q + 1, dtype=np.int8)
    if q == n - 1:
        matrix = core + eye
    else:
        matrix = np.kron(core, np.array([[1, 1], [1, -1]], dtype=np.int8))
        matrix += np.kron(eye, np.array([[1, -1], [-1, -1]], dtype=np.int8))
    matrix.setflags(write=False)
    return matrix


def _type_two_field(n: int) -> int | None:
    """The ``q = 1 mod 4`` with ``n = 2 (q + 1)``, where there is one."""
    q = n // 2 - 1
    return q if n % 4 == 0 and q % 4 == 1 and prime_power(q) is not None else None


def _jacobsthal(q: int) -> Signs:
    """``[q, q]`` matrix ``chi(a - b)`` over ``GF(q)``, elements numbered by their base-``p``
    digits.
    """
    field = prime_power(q)
    if field is None:
        raise ValueError(f"there is no field of {q} elements")
    p, k = field
    powers = _powers_of_a_generator(p, k)
    chi = np.zeros(q, dtype=np.int8)
    chi[powers[0::2]] = 1  # even powers of a generator are the squares
    chi[powers[1::2]] = -1
    digits = np.arange(q)[:, None] // p ** np.arange(k) % p
    difference = sum(
        ((digits[:, None, i] - digits[None, :, i]) % p * p**i for i in range(k)),
        np.zeros((q, q), dtype=np.int64),
    )
    return np.asarray(chi[difference], dtype=np.int8)


def _powers_of_a_generator(p: int, k: int) -> list[int]:
    """The ``p**k - 1`` powers of a generator of ``GF(p^k)*``, each as the number of its base-``p``
    digits.

    The field is ``GF(p)[x] / f``. For any monic ``f`` of degree ``k`` with a non-zero constant
    term, multiplication by ``x`` permutes the ring; where the orbit of 1 covers every non-zero
    element, each of those is a power of ``x`` and so has an inverse. The ring is then a field and
    ``x`` generates its units. One ``f`` in about ``k`` passes, and for ``k = 1`` the test finds a
    primitive root.
    """
    for low_terms in product(range(p), repeat=k):
        if low_terms[0] == 0:
            continue
        orbit = _orbit_of_one(p, low_terms)
        if len(orbit) == p**k - 1:
            return orbit
    # impossible: the units of a finite field are cyclic
    raise AssertionError(f"GF({p}^{k}) has no generator")


def _orbit_of_one(p: int, low_terms: tuple[int, ...]) -> list[int]:
    """Repeated multiplication of 1 by ``x``, modulo ``x^k = sum low_terms[i] x^i`` over ``GF(p)``,
    until 1 returns.
    """
    k = len(low_terms)
    orbit: list[int] = []
    digits = [1] + [0] * (k - 1)
    while True:
        orbit.append(sum(d * p**i for i, d in enumerate(digits)))
        carry = digits[-1]
        digits = [
            (shifted + carry * low) % p
            for shifted, low in zip([0, *digits[:-1]], low_terms, strict=True)
        ]
        if digits[0] == 1 and not any(digits[1:]):
            return orbit
