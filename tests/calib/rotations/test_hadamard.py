"""Hadamard matrices: exact in integers, fast form equal to the matrix, and traceable."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.errors import RotationError
from calib.rotations.hadamard import (
    apply_hadamard,
    block_order,
    factor_order,
    hadamard_factors,
    hadamard_matrix,
    random_signs,
)
from calib.rotations.paley import is_paley_order, paley_matrix, prime_power

# Hidden, intermediate and head sizes of published models.
MODEL_SIZES = [
    *(
        64,
        80,
        96,
        112,
        128,
        160,
        192,
        256,
        576,
        704,
        768,
        896,
        960,
        1024,
        1280,
        1408,
        1536,
        1600,
        2048,
        2560,
        3072,
    ),
    *(
        3584,
        4096,
        4544,
        4864,
        5120,
        5632,
        6656,
        6912,
        8192,
        8960,
        9728,
        10240,
        11008,
        12288,
        13824,
        14336,
        15360,
    ),
    *(17408, 17920, 18944, 22016, 25600, 27648, 28672, 29568, 29696),
]


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_the_factors_of_every_model_size_are_hadamard_in_exact_integers(n: int) -> None:
    factors = hadamard_factors(n)
    assert math.prod(f.shape[0] for f in factors) == n == block_order(n)
    assert tuple(f.shape[0] for f in factors) == factor_order(n)
    for factor in factors:
        order = factor.shape[0]
        assert factor.dtype == torch.int8
        assert bool((factor.abs() == 1).all())
        wide = factor.int()
        assert torch.equal(wide @ wide.T, order * torch.eye(order, dtype=torch.int32))


@pytest.mark.parametrize(
    ("n", "block"),
    [(172, 4), (13696, 128), (3, 1), (6, 2), (1852, 4), (2 * 43, 2)],
)
def test_where_no_order_fits_the_largest_block_that_divides_is_repeated(n: int, block: int) -> None:
    assert factor_order(n) is None
    assert block_order(n) == block
    with pytest.raises(RotationError, match=f"order {n}") as error:
        hadamard_factors(n)
    assert f"blocks of order {block}" in str(error.value.hint)


def test_few_factors_because_each_is_a_pass_over_the_activations() -> None:
    assert max(len(factor_order(n) or ()) for n in MODEL_SIZES) == 3
    assert all(f <= 64 for n in (4096, 8192, 16384) for f in factor_order(n) or ())


@pytest.mark.parametrize("n", [1, 2, 12, 28, 64, 100, 172, 192, 256, 344, 704])
@pytest.mark.parametrize("seed", [None, 7])
def test_the_matrix_is_orthonormal_and_the_fast_form_equals_it(n: int, seed: int | None) -> None:
    matrix = hadamard_matrix(n, seed=seed)
    assert matrix.dtype == torch.float64
    # n products of entries 1/sqrt(b) summed in float64.
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14 * max(n, 10)
    )
    x = torch.randn(3, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(apply_hadamard(x, seed=seed), x @ matrix, rtol=0, atol=1e-13)
    back = apply_hadamard(x, seed=seed, transposed=True)
    torch.testing.assert_close(back, x @ matrix.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(("n", "block"), [(1536, 128), (96, 32), (88, 8), (36, 12), (7, 1)])
def test_a_matrix_in_blocks_is_the_same_small_one_along_the_diagonal(
    n: int, block: int, seed: int | None
) -> None:
    matrix = hadamard_matrix(n, block=block, seed=seed)
    small = [hadamard_matrix(block)] * (n // block)
    plain = matrix if seed is None else matrix * random_signs(n, seed)[:, None]
    assert torch.equal(plain, torch.block_diag(*small))
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # sums of n products in float64
    assert torch.allclose(apply_hadamard(x, block=block, seed=seed), x @ matrix, atol=1e-12)
    back = apply_hadamard(x, block=block, seed=seed, transposed=True)
    assert torch.allclose(back, x @ matrix.T, atol=1e-12)


@pytest.mark.parametrize(("n", "block"), [(96, 64), (96, 3)])
def test_blocks_that_there_are_not_are_refused(n: int, block: int) -> None:
    with pytest.raises(RotationError, match=f"blocks of {block}") as caught:
        hadamard_matrix(n, block=block)
    assert "power of two" in str(caught.value.hint)


def test_signs_multiply_rows_so_that_the_input_is_flipped_first() -> None:
    signs = random_signs(12, 3)
    assert torch.equal(hadamard_matrix(12, seed=3), signs[:, None] * hadamard_matrix(12))
    assert set(signs.tolist()) == {-1.0, 1.0}


def test_signs_of_a_seed_never_change() -> None:
    # A manifest records order and seed only; these values are part of the format.
    assert random_signs(16, 0).tolist() == [
        -1.0,
        1.0,
        1.0,
        1.0,
        -1.0,
        -1.0,
        -1.0,
        -1.0,
        -1.0,
        -1.0,
        -1.0,
        1.0,
        -1.0,
        1.0,
        -1.0,
        1.0,
    ]
    assert torch.equal(random_signs(64, 5)[:16], random_signs(16, 5))
    assert not torch.equal(random_signs(64, 5), random_signs(64, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_error_is_that_of_rounding_the_inputs(dtype: torch.dtype) -> None:
    x = torch.randn(8, 704, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = apply_hadamard(x.double(), seed=1)
    fast = apply_hadamard(x, seed=1)
    assert fast.dtype == dtype
    naive = x @ hadamard_matrix(704, seed=1, dtype=dtype)
    # Two factors round twice, so at most twice the error of one matmul in the same dtype (the rule
    # of fast-hadamard).
    assert (fast.double() - exact).norm() <= 2 * (naive.double() - exact).norm()


def test_export_with_dynamic_batch_depends_on_its_input() -> None:
    class Rotate(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return apply_hadamard(x, seed=1)

    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    program = torch.export.export(
        Rotate(), (torch.randn(2, 3, 704),), dynamic_shapes=dynamic
    ).module()
    x = torch.randn(4, 7, 704, generator=torch.Generator().manual_seed(0))
    assert torch.equal(program(x), apply_hadamard(x, seed=1))
    assert not torch.equal(program(x), program(2 * x))


@pytest.mark.parametrize("q", [3, 5, 9, 25, 27, 49, 81, 125, 343])
def test_paley_over_prime_and_prime_power_fields(q: int) -> None:
    n = q + 1 if q % 4 == 3 else 2 * (q + 1)
    assert is_paley_order(n)
    matrix = torch.tensor(paley_matrix(n)).int()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.int32))


@settings(max_examples=100, deadline=None)  # deadline: the first call of an order builds it
@given(st.integers(min_value=1, max_value=400))
def test_any_number_of_channels_has_an_orthonormal_form(n: int) -> None:
    block = block_order(n)
    assert n % block == 0
    assert math.prod(factor_order(block) or ()) == block
    matrix = hadamard_matrix(n, seed=n)
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert torch.allclose(
        matrix[matrix != 0].abs(), torch.tensor(block**-0.5, dtype=torch.float64), rtol=1e-15
    )


@settings(deadline=None)
@given(st.integers(min_value=-3, max_value=3000))
def test_prime_power_agrees_with_its_definition(q: int) -> None:
    found = prime_power(q)
    powers = {
        p**k: (p, k)
        for p in range(2, 3001)
        if all(p % d for d in range(2, int(p**0.5) + 1))
        for k in range(1, 12)
    }
    assert found == powers.get(q)


def test_bad_input_is_refused_with_a_hint() -> None:
    for call in (
        lambda: factor_order(0),
        lambda: hadamard_matrix(-4),
        lambda: random_signs(4, -1),
        lambda: apply_hadamard(torch.ones(3, 4, dtype=torch.int32)),
        lambda: apply_hadamard(torch.tensor(1.0)),
    ):
        with pytest.raises(RotationError) as error:
            call()
        assert error.value.hint
    with pytest.raises(ValueError, match="Paley"):
        paley_matrix(16 + 6)
