"""Starts: orthogonal, reproducible, and doing what each is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calib.errors import RotationError
from calib.rotations.starts import (
    START_NAMES,
    StartName,
    embed_fixing_ones,
    haar_start,
    hadamard_start,
    make_start,
    ones_complement,
    pca_hadamard_start,
    pca_ones_start,
    restrict_to_complement,
)

# A product of a handful of float64 orthogonal matrices of order below 300.
EXACT = 1e-12
ORDERS = [2, 12, 30, 172, 256]


def moment_of(n: int, *batch: int) -> Tensor:
    """The second moment of 40 tokens with one large shared direction."""
    x = torch.randn(*batch, 40, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    x = x + 5.0 * torch.linspace(-1, 2, n, dtype=torch.float64)
    return x.mT @ x / 40


def assert_orthogonal(matrix: Tensor) -> None:
    n = matrix.shape[-1]
    assert matrix.dtype == torch.float64
    eye = torch.eye(n, dtype=torch.float64).expand_as(matrix)
    torch.testing.assert_close(matrix.mT @ matrix, eye, rtol=0, atol=EXACT)


@pytest.mark.parametrize("n", ORDERS)
@pytest.mark.parametrize("fix_ones", [False, True])
@pytest.mark.parametrize("name", START_NAMES)
def test_every_start_is_orthogonal_and_fixes_ones_where_asked(
    name: StartName, n: int, fix_ones: bool
) -> None:
    if name == "pca-ones" and fix_ones:
        with pytest.raises(RotationError, match="all-ones") as error:
            make_start(name, n, seed=0, moment=moment_of(n), fix_ones=True)
        assert "pca-hadamard" in str(error.value.hint)
        return
    matrix = make_start(name, n, seed=3, moment=moment_of(n), fix_ones=fix_ones)
    assert_orthogonal(matrix)
    assert torch.equal(matrix, make_start(name, n, seed=3, moment=moment_of(n), fix_ones=fix_ones))
    if fix_ones:
        ones = torch.ones(n, dtype=torch.float64)
        torch.testing.assert_close(ones @ matrix, ones, rtol=0, atol=EXACT)
        torch.testing.assert_close(matrix @ ones, ones, rtol=0, atol=EXACT)


def test_layer_norm_commutes_with_a_rotation_that_fixes_ones_and_with_no_other() -> None:
    x = torch.randn(50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = torch.nn.LayerNorm(64, elementwise_affine=False, dtype=torch.float64)
    fixing = haar_start(64, 1, fix_ones=True)
    torch.testing.assert_close(norm(x @ fixing), norm(x) @ fixing, rtol=0, atol=EXACT)
    free = haar_start(64, 1)
    assert (norm(x @ free) - norm(x) @ free).abs().max() > 1e-2


@pytest.mark.parametrize("n", [12, 256, 1024])
def test_the_ones_fixing_hadamard_still_spreads(n: int) -> None:
    entries = hadamard_start(n, 0, fix_ones=True).abs()
    # A reflection moves each row by at most twice its component along u: rows stay flat but for a
    # few entries.
    assert entries.max() <= 2 - 4 / n**0.5 + EXACT
    assert entries.median() <= 1.1 / n**0.5


@pytest.mark.parametrize("n", [12, 172, 256])
def test_pca_hadamard_gives_all_channels_of_a_block_the_same_power(n: int) -> None:
    moment = moment_of(n)
    power = torch.diagonal(pca_hadamard_start(moment, 0).T @ moment @ pca_hadamard_start(moment, 0))
    if n == 172:  # blocks of order 4: equal within each
        power = power.reshape(-1, 4)
        target = power.mean(-1, keepdim=True).expand_as(power)
    else:
        target = torch.full_like(power, float(moment.trace() / n))
    torch.testing.assert_close(power, target, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [12, 172, 256])
def test_pca_ones_sends_the_top_principal_axis_to_ones(n: int) -> None:
    moment = moment_of(n)
    top = torch.linalg.eigh(moment).eigenvectors[:, -1]
    image = top @ pca_ones_start(moment, 0)
    constant = torch.full((n,), n**-0.5, dtype=torch.float64)
    torch.testing.assert_close(image * image[0].sign(), constant, rtol=0, atol=1e-9)


def test_pca_starts_are_batched() -> None:
    moments = moment_of(16, 2, 3)
    for start in (pca_hadamard_start(moments, 0), pca_ones_start(moments, 0)):
        assert start.shape == (2, 3, 16, 16)
        assert_orthogonal(start)
    one = pca_hadamard_start(moments[1, 2], 0)
    torch.testing.assert_close(pca_hadamard_start(moments, 0)[1, 2], one, rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [2, 7, 64])
def test_the_complement_of_ones_and_its_embedding_are_inverse(n: int) -> None:
    basis = ones_complement(n)
    torch.testing.assert_close(
        basis.T @ basis, torch.eye(n - 1, dtype=torch.float64), rtol=0, atol=EXACT
    )
    assert basis.sum(0).abs().max() <= EXACT
    inner = haar_start(n - 1, 0)
    torch.testing.assert_close(
        restrict_to_complement(embed_fixing_ones(inner)), inner, rtol=0, atol=EXACT
    )


def test_bad_input_is_refused_with_a_hint() -> None:
    bad = torch.eye(4, dtype=torch.float64)
    bad[0, 0] = float("nan")
    for call in (
        lambda: make_start("cayley", 4, seed=0, moment=None),  # type: ignore[arg-type]
        lambda: make_start("pca-hadamard", 4, seed=0, moment=None),
        lambda: pca_hadamard_start(torch.ones(3, 4), 0),
        lambda: pca_ones_start(bad, 0),
        lambda: ones_complement(1),
    ):
        with pytest.raises(RotationError) as error:
            call()
        assert error.value.hint
