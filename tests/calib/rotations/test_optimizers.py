"""Steps on the orthogonal group: what each promises, on small problems with a known answer."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.errors import RotationError
from calib.rotations.objectives import Objective, make_objective
from calib.rotations.optimizers import MonotoneStepper, QrStepper, RiemannianStepper
from calib.rotations.polar import newton_schulz, polar_factor, project_orthogonal, spectral_norm
from calib.rotations.problem import Problem
from calib.rotations.quantizer import ActivationScheme
from calib.rotations.starts import haar_start

EXACT = 1e-12


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Float32 activations with outliers, of unit mean square."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()
    return x / x.square().mean().sqrt()


def polar_by_svd(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix.double())
    factor: Tensor = u @ vh
    return factor


def orthogonality_error(matrix: Tensor) -> float:
    return float((matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype)).abs().max())


@example(22, 2.0, 4761)  # the largest singular value was found too small, and its direction flipped
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.floats(0, 5), st.integers(0, 10_000))
def test_newton_schulz_finds_the_polar_factor_whatever_the_conditioning(
    n: int, decades: float, seed: int
) -> None:
    singular = torch.logspace(0, -decades, n, dtype=torch.float64)
    matrix = (haar_start(n, seed) * singular) @ haar_start(n, seed + 1)
    factor = newton_schulz(matrix, least=1e-3, tolerance=1e-10)
    # A tolerance t on X^T X leaves an error of t / 2 in each direction.
    torch.testing.assert_close(factor, polar_by_svd(matrix), rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.floats(0, 3), st.integers(0, 10_000))
def test_the_polar_factor_is_right_where_squaring_loses_the_condition(
    n: int, decades: float, seed: int
) -> None:
    singular = torch.logspace(0, -decades, n, dtype=torch.float64)
    matrix = (haar_start(n, seed) * singular) @ haar_start(n, seed + 1)
    factor = polar_factor(matrix, tolerance=1e-10)
    # eps * condition^2 is 2e-10 at three decades, a few times over.
    torch.testing.assert_close(factor, polar_by_svd(matrix), rtol=0, atol=1e-8)


def test_newton_schulz_is_batched_over_any_dimensions() -> None:
    matrices = torch.randn(
        2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    factors = newton_schulz(matrices, least=1e-3, tolerance=1e-10)
    torch.testing.assert_close(factors, polar_by_svd(matrices), rtol=0, atol=1e-9)


@pytest.mark.parametrize("decades", [0.0, 1.0, 4.0])
def test_the_spectral_norm_is_never_underestimated(decades: float) -> None:
    for seed in range(20):
        singular = torch.logspace(0, -decades, 64, dtype=torch.float64)
        matrix = (haar_start(64, seed) * singular) @ haar_start(64, seed + 1)
        # Above 1, or the scaled cubic would change the sign of a singular value; at most the stated
        # margin above.
        assert 1.0 <= float(spectral_norm(matrix)) <= 1.2 + 1e-9


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3, 1.0])
def test_projection_gives_the_nearest_orthogonal_matrix_in_float64(noise: float) -> None:
    matrix = haar_start(48, 0) + noise * torch.randn(
        48, 48, generator=torch.Generator().manual_seed(1)
    )
    projected = project_orthogonal(matrix)
    assert orthogonality_error(projected) <= EXACT
    torch.testing.assert_close(projected, polar_by_svd(matrix), rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2])
def test_projection_of_a_float32_matrix_is_orthogonal_in_float64(noise: float) -> None:
    matrix = (
        haar_start(48, 0) + noise * torch.randn(48, 48, generator=torch.Generator().manual_seed(1))
    ).float()
    projected = project_orthogonal(matrix)
    assert orthogonality_error(projected) <= EXACT
    # Its first round is in float32: products of 48 terms of size 1 / sqrt(48).
    torch.testing.assert_close(projected, polar_by_svd(matrix), rtol=0, atol=1e-6)


@pytest.mark.parametrize("short", [1, 16])
def test_a_polar_factor_that_eigh_leaves_short_is_finished(short: int) -> None:
    # Float32 squares a condition of 1e4 to 1e8, beyond its rounding: these directions come out of
    # eigh as noise.
    singular = torch.ones(64, dtype=torch.float64)
    singular[:short] = 1e-4
    matrix = ((haar_start(64, 0) * singular) @ haar_start(64, 1)).float()
    factor = polar_factor(matrix, tolerance=1e-3).double()
    off = factor.mT @ factor - torch.eye(64, dtype=torch.float64)
    assert float(off.norm()) / 64**0.5 <= 1e-3


def test_projection_refuses_nan() -> None:
    with pytest.raises(RotationError, match="NaN") as error:
        project_orthogonal(torch.full((3, 3), float("nan")))
    assert error.value.hint


@pytest.mark.parametrize("name", ["whip", "lp", "kurtosis", "range", "scheme"])
@pytest.mark.parametrize("fraction", [1.0, 0.1])
def test_the_monotone_step_never_raises_the_loss_of_a_full_batch(
    name: str, fraction: float
) -> None:
    x = heavy_tailed(3, 96, 16)
    objective = make_objective(name, scheme=ActivationScheme(4))  # type: ignore[arg-type]
    stepper = MonotoneStepper(
        haar_start(16, 0).float().expand(3, 16, 16),
        Problem(objective),
        fraction=fraction,
        damping=0.03,
    )
    losses = torch.stack([stepper.step(x, None) for _ in range(12)])
    assert (losses.diff(dim=0) <= 2e-6 * losses[:-1].abs()).all()  # float32 means of 96 tokens
    assert (losses[-1] < losses[0]).all()
    assert orthogonality_error(stepper.rotation()) <= 5e-3  # the tolerance of its polar factors


def test_the_whip_step_is_the_published_polar_formula() -> None:
    x = heavy_tailed(200, 12)
    q = haar_start(12, 0).float()
    y = x @ q
    expected = polar_by_svd(x.T @ (y.sign() * torch.exp(-y.abs()) + y))
    stepper = MonotoneStepper(q, Problem(make_objective("whip")), fraction=1.0, damping=1e-9)
    stepper.step(x, None)
    torch.testing.assert_close(stepper.rotation().double(), expected, rtol=0, atol=1e-4)


def test_the_proven_step_finds_the_box_that_independent_uniform_channels_hide_in() -> None:
    # Uniform channels are the least of Whip at fixed power; mixed by a rotation they must be found
    # again.
    x = (torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 3**0.5
    stepper = MonotoneStepper(
        torch.eye(4), Problem(make_objective("whip")), fraction=0.25, damping=0.03
    )
    mixed = x @ haar_start(4, 3).float()
    for _ in range(60):
        stepper.step(mixed, None)
    entries = (haar_start(4, 3).float() @ stepper.rotation()).abs()
    # A signed permutation up to the sampling error of 20 000 tokens, about 1 / sqrt(20 000) an
    # entry.
    torch.testing.assert_close(entries.sort(dim=0).values[-1], torch.ones(4), rtol=0, atol=0.02)


def whip_or_lp_losses(name: str, steps: int = 12) -> Tensor:
    """Loss of three heads before the last of ``steps`` damped steps."""
    x = heavy_tailed(3, 96, 16)
    objective = make_objective(name)  # type: ignore[arg-type]
    start = haar_start(16, 0).float().expand(3, 16, 16)
    stepper = MonotoneStepper(start, Problem(objective), fraction=1.0, damping=0.3)
    return torch.stack([stepper.step(x, None) for _ in range(steps)])[-1]


def test_extrapolated_steps_go_farther_than_as_many_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead = whip_or_lp_losses("whip")
    monkeypatch.setattr("calib.rotations.optimizers._EXTRAPOLATION", 0.0)
    assert (ahead < whip_or_lp_losses("whip")).all()


def test_losses_without_a_known_curvature_are_not_extrapolated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = whip_or_lp_losses("lp")
    monkeypatch.setattr("calib.rotations.optimizers._EXTRAPOLATION", 0.5)
    assert torch.equal(plain, whip_or_lp_losses("lp"))


def test_nothing_is_extrapolated_from_one_batch_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [heavy_tailed(96, 16, seed=seed) for seed in range(4)]

    def trained() -> Tensor:
        stepper = MonotoneStepper(
            haar_start(16, 0).float(), Problem(make_objective("whip")), fraction=1.0, damping=0.3
        )
        for batch in batches:
            stepper.step(batch, None)
        return stepper.rotation()

    with_extrapolation = trained()
    monkeypatch.setattr("calib.rotations.optimizers._EXTRAPOLATION", 0.0)
    assert torch.equal(with_extrapolation, trained())


@pytest.mark.parametrize("fraction", [1.0, 1e-5])
def test_the_weight_of_a_token_counts_as_copies_of_it(fraction: float) -> None:
    x = heavy_tailed(96, 16).double()
    copies = torch.randint(1, 4, (96,), generator=torch.Generator().manual_seed(0))
    # Convex, so that too small a curvature overshoots and has to be doubled.
    problem = Problem(Objective("quartic", lambda y: y.pow(4).sum(-1), curvature=1e4))
    ends, curvatures = [], []
    for samples, weights in ((x, copies.double()), (x.repeat_interleave(copies, 0), None)):
        stepper = MonotoneStepper(haar_start(16, 0), problem, fraction=fraction, damping=0.2)
        for _ in range(3):
            stepper.step(samples, weights)
        ends.append(stepper.rotation())
        curvatures.append(float(stepper._fraction))
    assert curvatures[0] == curvatures[1]
    assert (curvatures[0] > fraction) == (fraction < 1.0)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-9)  # float64 sums in another order


def test_a_fallback_from_the_extrapolation_is_head_by_head() -> None:
    # A head at its minimum falls back in every step; beside it the others must step as they do
    # alone.
    settled = torch.eye(8).repeat(12, 1) * 3.0
    single = heavy_tailed(96, 8)
    x = torch.stack([settled, single])
    start = torch.eye(8).expand(2, 8, 8)
    together = MonotoneStepper(start, Problem(make_objective("whip")), fraction=0.1, damping=0.03)
    alone = MonotoneStepper(start[1], Problem(make_objective("whip")), fraction=0.1, damping=0.03)
    for _ in range(4):
        together.step(x, None)
        alone.step(single, None)
    # Batched and single kernels add in another order, and the polar factors stop at 5e-3 of
    # orthogonal.
    torch.testing.assert_close(together.rotation()[1], alone.rotation(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("tokens", [0.0, 1.0])
def test_dead_heads_and_few_tokens_stay_finite_and_orthogonal(tokens: float) -> None:
    x = tokens * heavy_tailed(2, 4, 16)  # fewer tokens than channels, or none that carry anything
    start = haar_start(16, 0).float().expand(2, 16, 16)
    stepper = MonotoneStepper(start, Problem(make_objective("whip")), fraction=0.1, damping=0.03)
    for _ in range(5):
        stepper.step(x, None)
    assert orthogonality_error(stepper.rotation()) <= 5e-3  # the tolerance of its polar factors
    if tokens == 0.0:
        # float32 polar factors
        torch.testing.assert_close(stepper.rotation(), start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("retraction", ["ns", "cayley"])
def test_riemannian_steps_stay_on_the_group_and_go_down(
    retraction: Literal["ns", "cayley"],
) -> None:
    x = heavy_tailed(2, 128, 16)
    stepper = RiemannianStepper(
        haar_start(16, 0).float().expand(2, 16, 16),
        Problem(make_objective("whip")),
        lr=0.02,
        momentum=0.5,
        retraction=retraction,
        accumulate=1,
    )
    losses = torch.stack([stepper.step(x, None) for _ in range(40)])
    assert (losses[-1] < losses[0]).all()
    # an entry of each of 40 products sums 16 rounded terms
    drift = 40 * 16 * torch.finfo(torch.float32).eps / 2
    assert orthogonality_error(stepper.rotation()) <= drift


def test_both_retractions_agree_to_second_order() -> None:
    x, start = heavy_tailed(128, 16), haar_start(16, 0).float()
    ends = []
    retractions: tuple[Literal["ns", "cayley"], ...] = ("ns", "cayley")
    for retraction in retractions:
        stepper = RiemannianStepper(
            start,
            Problem(make_objective("whip")),
            lr=1e-2,
            momentum=0.0,
            retraction=retraction,
            accumulate=1,
        )
        stepper.step(x, None)
        ends.append(stepper.rotation())
    moved = float((ends[0] - start).norm())
    assert moved > 1e-3
    assert float((ends[0] - ends[1]).norm()) <= moved**3 + 1e-5


def test_the_qr_step_is_the_reference_algorithm_with_its_last_step() -> None:
    x, start = heavy_tailed(64, 8), haar_start(8, 0).float()
    latent = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([latent], lr=1.5e-3, momentum=0.9)
    stepper = QrStepper(
        start, Problem(make_objective("whip")), lr=1.5e-3, momentum=0.9, update="sgd", accumulate=1
    )
    for _ in range(5):
        q, _ = torch.linalg.qr(latent)
        loss = torch.exp(-(x @ q).abs()).sum(-1).mean()
        assert torch.equal(stepper.step(x, None), loss.detach())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(stepper.rotation(), torch.linalg.qr(latent.detach()).Q)


@pytest.mark.parametrize("kind", ["qr", "riemannian"])
def test_accumulation_averages_the_gradients_of_its_batches(kind: str) -> None:
    x, start = heavy_tailed(64, 8), haar_start(8, 0).float()

    def trained(accumulate: int, batches: list[Tensor]) -> Tensor:
        problem = Problem(make_objective("whip"))
        stepper: QrStepper | RiemannianStepper
        if kind == "qr":
            stepper = QrStepper(
                start, problem, lr=0.1, momentum=0.0, update="sgd", accumulate=accumulate
            )
        else:
            stepper = RiemannianStepper(
                start, problem, lr=0.1, momentum=0.0, retraction="ns", accumulate=accumulate
            )
        for batch in batches:
            stepper.step(batch, None)
        return stepper.rotation()

    # Two halves against the whole: sums in another order, in float32.
    torch.testing.assert_close(trained(2, [x[:32], x[32:]]), trained(1, [x]), rtol=0, atol=1e-5)


def test_a_singular_latent_is_refused_with_a_way_out() -> None:
    stepper = QrStepper(
        torch.zeros(4, 4),
        Problem(make_objective("whip")),
        lr=1.0,
        momentum=0.0,
        update="sgd",
        accumulate=1,
    )
    with pytest.raises(RotationError, match="singular") as error:
        stepper.step(heavy_tailed(8, 4), None)
    assert "monotone" in str(error.value.hint)
