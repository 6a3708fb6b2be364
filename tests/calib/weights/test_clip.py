"""Rounding to nearest and the search for limits: against each other, and against an exhaustive
search.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from weights_support import ALL_SCHEMES, correlated_moment, is_on_grid, random_weight

from calib.arithmetic.grids import dequantize, grid_of, quantize, weight_grid, weight_limits
from calib.errors import QuantizationError
from calib.schemes import FLOAT4, INT4, INT8, PerBlock, PerChannel, PerTensor, TensorScheme
from calib.weights.clip import clip_grid, mse, rtn
from calib.weights.rounded import keep_best, output_error, row_errors


def squared(weight: Tensor, values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Squared error of each row, float64."""
    squares = (values.double() - weight.double()).square()
    return (squares if counts is None else squares * counts).sum(dim=1)


@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_rtn_is_quantize_on_the_covering_grid(name: str) -> None:
    scheme, weight = ALL_SCHEMES[name], random_weight(8, 40)
    grid = weight_grid(weight, scheme)
    assert torch.equal(
        rtn(weight, scheme).values(scheme), dequantize(quantize(weight, grid, scheme), grid, scheme)
    )
    assert torch.equal(
        rtn(weight.double(), scheme).values(scheme), rtn(weight, scheme).values(scheme)
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_searched_limits_never_lose_more(name: str, weighted: bool) -> None:
    """In the error that is searched, and clearly less in 4 bits with free scales; every value can
    be stored.
    """
    scheme, weight, moment = ALL_SCHEMES[name], random_weight(24, 80), correlated_moment(80)
    counts = moment.diagonal() if weighted else None
    found = mse(weight, scheme, moment=moment if weighted else None)
    before = squared(weight, rtn(weight, scheme).values(scheme), counts)
    after = squared(weight, found.values(scheme), counts)
    assert is_on_grid(found, scheme)
    if isinstance(scheme.granularity, PerTensor):
        before, after = before.sum(), after.sum()
    # the search compares float32 sums of up to 1920 squares, each good to a few eps of the largest
    # partial sum
    assert bool((after <= before * (1 + 1e-5)).all())
    if scheme.format.bits == 4 and scheme.scale_format == "compute":
        assert float(after.sum()) < 0.95 * float(before.sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [8, 16, 64])
def test_two_stages_find_what_a_dense_scan_does(symmetric: bool, width: int) -> None:
    """A row may have a narrow dip next to a coarse point, but over 200 rows hardly anything is
    missed.
    """
    scheme, weight = TensorScheme(INT4, PerChannel(0), symmetric), random_weight(200, width)
    low, high = weight_limits(weight, scheme.granularity)
    best = torch.full((200,), torch.inf, dtype=torch.float64)
    for ratio in torch.linspace(0.16, 1.04, 221):
        grid = grid_of(low * ratio, high * ratio, scheme)
        best = torch.minimum(
            best, squared(weight, dequantize(quantize(weight, grid, scheme), grid, scheme))
        )
    found = squared(weight, mse(weight, scheme).values(scheme))
    # 1.2 % at most was seen; rounding to nearest on the covering grid is 9 % and more above
    assert float(found.sum()) <= 1.03 * float(best.sum())
    assert float(squared(weight, rtn(weight, scheme).values(scheme)).sum()) > 1.06 * float(
        best.sum()
    )


def test_importance_moves_the_limits() -> None:
    """The outlier of a channel that is never used is clipped; one that alone is used is met within
    a small step.
    """
    weight = torch.linspace(-1, 1, 64)[None].repeat(2, 1)
    weight[:, 0] = 6.0
    scheme = TensorScheme(INT4, PerChannel(0))
    unused, alone = torch.ones(64), torch.zeros(64)
    unused[0], alone[0] = 0, 1
    assert float(clip_grid(weight, scheme, importance=unused).scale.max()) < 1.3 / 7
    assert (
        float((mse(weight, scheme, moment=torch.diag(alone)).values(scheme)[:, 0] - 6).abs().max())
        < 0.01
    )


def test_dead_groups_and_nothing_to_count_keep_the_covering_grid() -> None:
    weight = random_weight(4, 64)
    weight[:, 16:32] = 0
    scheme = TensorScheme(INT4, PerBlock(16))
    grid = clip_grid(weight, scheme, importance=torch.zeros(64))
    assert torch.equal(grid.scale, weight_grid(weight, scheme).scale)
    assert bool((mse(weight, scheme).values(scheme)[:, 16:32] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_have_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    scheme, weight = TensorScheme(INT8, PerChannel(0), symmetric=False), random_weight(4, 20)
    for found in (rtn(weight, scheme, dtype), mse(weight, scheme, dtype)):
        assert found.grid.scale.dtype == dtype
        assert found.grid.zero_point is not None
        assert found.grid.zero_point.dtype == dtype
        assert is_on_grid(found, scheme)


def test_the_second_level_is_that_of_the_whole_tensor() -> None:
    """However far blocks are shrunk: scales are E4M3 numbers under one factor."""
    scheme, weight = TensorScheme(FLOAT4, PerBlock(16), scale_format="e4m3"), random_weight(8, 64)
    grid = mse(weight, scheme).grid
    assert grid.second_level is not None
    torch.testing.assert_close(grid.second_level, weight.abs().max() / (6 * 448), rtol=1e-6, atol=0)
    assert torch.equal(grid.scale.to(torch.float8_e4m3fn).float(), grid.scale)


def test_output_error_is_that_of_the_tokens() -> None:
    """tr(dW H dWᵀ) / tr(W H Wᵀ) against outputs computed token by token."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    weight, other = torch.randn(2, 5, 12, generator=generator)
    wanted = (x @ (other - weight).double().T).square().sum() / (
        x @ weight.double().T
    ).square().sum()
    # float32 products of 12 terms
    assert output_error(weight, other, x.T @ x / 200) == pytest.approx(float(wanted), rel=1e-5)
    assert output_error(weight, weight, x.T @ x) == 0
    assert output_error(torch.zeros(5, 12), other, torch.zeros(12, 12)) == 0


def test_a_moment_that_does_not_fit_is_refused() -> None:
    scheme, weight = TensorScheme(INT8, PerChannel(0)), random_weight(4, 20)
    with pytest.raises(QuantizationError, match=r"needs a second moment \[20, 20\], not \[4, 4\]"):
        mse(weight, scheme, moment=torch.eye(4))
    with pytest.raises(QuantizationError, match="NaN or Inf"):
        mse(weight, scheme, moment=torch.full((20, 20), torch.nan))


def test_of_roundings_with_a_scale_for_each_column_a_whole_one_is_kept() -> None:
    """Also where the weight is square, and there are as many scales as rows."""
    scheme, weight, moment = (
        TensorScheme(INT4, PerChannel(1)),
        random_weight(16, 16),
        correlated_moment(16),
    )
    candidates = [rtn(weight, scheme), mse(weight, scheme)]
    errors = [float(row_errors(weight, one.values(scheme), moment).sum()) for one in candidates]
    kept = keep_best(weight, moment, scheme, candidates)
    assert kept is candidates[errors.index(min(errors))]
