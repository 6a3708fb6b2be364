"""Training: every result is orthogonal, reproducible and no worse, and odd input has a defined
outcome.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from calib.errors import RotationError
from calib.rotations.objectives import whole_inputs
from calib.rotations.quantizer import ActivationScheme, scheme_error
from calib.rotations.starts import haar_start, hadamard_start
from calib.rotations.tokens import second_moment
from calib.rotations.train import TrainResult, train_rotation
from calib.rotations.train_config import TrainConfig

INT4 = ActivationScheme(4)
OPTIMIZERS = ["qr", "riemannian-ns", "riemannian-cayley", "monotone"]


def activations(*shape: int, seed: int = 0) -> Tensor:
    """Heavy-tailed features mixed into channels, as residual streams are; unit mean square."""
    generator = torch.Generator().manual_seed(seed)
    n = shape[-1]
    features = (
        torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()
    )
    mixing = torch.randn(n, n, generator=torch.Generator().manual_seed(99)) / n**0.5
    x: Tensor = features @ mixing
    return x / x.square().mean().sqrt()


def assert_orthogonal(matrix: Tensor) -> None:
    assert matrix.dtype == torch.float64
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64).expand_as(matrix)
    # One float64 polar projection: rounding of products of order below 100.
    torch.testing.assert_close(matrix.mT @ matrix, eye, rtol=0, atol=1e-12)
    single = matrix.float()
    torch.testing.assert_close(single.mT @ single, eye.float(), rtol=0, atol=1e-6)


def config_for(optimizer: str, **changes: object) -> TrainConfig:
    config = TrainConfig(
        objective="whip",
        optimizer=optimizer,  # type: ignore[arg-type]
        epochs=8,
        lr=2e-2,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fix_ones", [False, True])
def test_every_optimizer_gives_an_orthogonal_rotation_with_a_lower_loss(
    optimizer: str, fix_ones: bool
) -> None:
    x = activations(2, 3, 200, 20)
    if fix_ones:
        x = x - x.mean(-1, keepdim=True)
    result = train_rotation(x, config_for(optimizer, fix_ones=fix_ones))
    assert result.matrix.shape == (2, 3, 20, 20)
    assert_orthogonal(result.matrix)
    assert result.losses[-1] < result.losses[0]
    assert result.steps == 8 == len(result.losses) - 1
    if fix_ones:
        ones = torch.ones(20, dtype=torch.float64)
        torch.testing.assert_close(result.matrix @ ones, ones.expand(2, 3, 20), rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_seed_gives_the_same_bytes(optimizer: str) -> None:
    x = activations(300, 12)
    config = config_for(optimizer, batch_size=64, epochs=3)
    first, second = (train_rotation(x, config) for _ in range(2))
    assert torch.equal(first.matrix, second.matrix)
    assert first.losses == second.losses
    assert not torch.equal(first.matrix, train_rotation(x, replace(config, seed=1)).matrix)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_batch_is_solved_as_if_each_were_alone(optimizer: str) -> None:
    x = activations(3, 100, 8)
    together = train_rotation(x, config_for(optimizer)).matrix
    for one, matrix in zip(x, together, strict=True):
        alone = train_rotation(one, config_for(optimizer)).matrix
        # Eight steps in float32, with batched and plain kernels summing in different orders.
        torch.testing.assert_close(matrix, alone, rtol=0, atol=2e-3)


@pytest.mark.parametrize("start", ["identity", "random", "hadamard", "pca-hadamard", "pca-ones"])
def test_no_epochs_returns_the_start(start: str) -> None:
    x = activations(50, 16)
    result = train_rotation(x, TrainConfig(start=start, epochs=0))  # type: ignore[arg-type]
    assert result.steps == 0
    assert result.start == start
    if start == "identity":
        assert torch.equal(result.matrix, torch.eye(16, dtype=torch.float64))
    assert_orthogonal(result.matrix)


def test_a_given_start_is_used_for_the_whole_batch() -> None:
    x = activations(2, 50, 16)
    start = haar_start(16, 5)
    result = train_rotation(x, TrainConfig(epochs=0), start=start)
    assert result.start == "given"
    torch.testing.assert_close(result.matrix, start.expand(2, 16, 16), rtol=0, atol=1e-12)


def test_early_stop_returns_the_rotation_with_the_lowest_held_out_error_per_head() -> None:
    train, held_out = activations(4, 40, 16), activations(4, 400, 16, seed=1)
    config = TrainConfig(objective="scheme", scheme=INT4, epochs=30)
    result = train_rotation(train, config, held_out=held_out)
    stopped = train_rotation(train, replace(config, patience=2), held_out=held_out)
    assert len(result.held_out_errors) == 31
    assert stopped.steps < 30
    unit = train.square().mean((-1, -2), keepdim=True).sqrt()
    kept = scheme_error((held_out / unit) @ result.matrix.float(), INT4)
    start = scheme_error((held_out / unit) @ hadamard_start(16, 0).float(), INT4)
    # 40 tokens are too few: some heads overfit, none may be handed back worse than its start.
    assert (kept <= start * (1 + 1e-5)).all()
    assert float(kept.mean()) <= min(result.held_out_errors) * (1 + 1e-5)


def test_early_stop_on_a_loss_that_no_longer_falls() -> None:
    x = activations(500, 8)
    result = train_rotation(x, TrainConfig(epochs=500, tolerance=1e-4))
    assert 1 < result.steps < 500


def test_weights_act_as_repetitions() -> None:
    x = activations(60, 8)
    counts = torch.randint(1, 4, (60,), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(epochs=5, normalize=False)
    weighted = train_rotation(x, config, weights=counts.float())
    repeated = train_rotation(x.repeat_interleave(counts, dim=0), config)
    # The same sums in float32 in another order.
    assert weighted.losses == pytest.approx(repeated.losses, rel=1e-4)
    moment = second_moment(x.repeat_interleave(counts, dim=0))
    torch.testing.assert_close(second_moment(x, counts.float()), moment, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_fewer_tokens_than_channels_still_give_a_rotation(optimizer: str, tokens: int) -> None:
    assert_orthogonal(train_rotation(activations(tokens, 16), config_for(optimizer)).matrix)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_dead_head_does_not_disturb_the_others(optimizer: str) -> None:
    x = activations(3, 64, 8)
    x[1] = 0
    result = train_rotation(x, config_for(optimizer))
    assert_orthogonal(result.matrix)
    alone = train_rotation(x[2], config_for(optimizer))
    torch.testing.assert_close(result.matrix[2], alone.matrix, rtol=0, atol=2e-3)
    if optimizer == "monotone":  # nothing to learn from: the start
        torch.testing.assert_close(result.matrix[1], hadamard_start(8, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_of_any_floating_dtype_are_taken(dtype: torch.dtype) -> None:
    assert_orthogonal(train_rotation(activations(64, 8).to(dtype), TrainConfig(epochs=2)).matrix)


def test_weights_of_half_precision_samples_do_not_overflow() -> None:
    """Their sum, the number of tokens seen, is beyond float16."""
    x, weights = activations(64, 8).half(), torch.linspace(1000, 3000, 64)
    half = train_rotation(x, TrainConfig(epochs=2), weights=weights)
    single = train_rotation(x.float(), TrainConfig(epochs=2), weights=weights)
    assert half.losses == single.losses
    assert torch.equal(half.matrix, single.matrix)


def test_progress_counts_the_steps() -> None:
    seen: list[tuple[int, int | None]] = []
    config = TrainConfig(epochs=3, batch_size=30, subset=0.5)
    result = train_rotation(
        activations(100, 8), config, progress=lambda stage, done, total: seen.append((done, total))
    )
    assert seen == [(i, 6) for i in range(1, 7)]  # half of four batches, three times
    assert result.steps == 6


def test_options_of_the_reference_run() -> None:
    x = activations(2, 128, 8)
    reference = TrainConfig.reference()
    assert (reference.lr, reference.momentum, reference.epochs, reference.subset) == (
        1.5e-3,
        0.9,
        10,
        0.1,
    )
    for config in (
        replace(reference, batch_size=8),
        replace(TrainConfig.reference(rotation="r2"), batch_size=32, update="adam", cosine=True),
        config_for("riemannian-ns", cosine=True, accumulation_steps=2, batch_size=32),
    ):
        result: TrainResult = train_rotation(x, config)
        assert_orthogonal(result.matrix)
        before = train_rotation(x, replace(config, epochs=0)).losses[-1]
        assert result.losses[-1] <= before * 1.001  # so few and small steps: down, or level


def nan_samples() -> Tensor:
    x = activations(10, 8)
    x[3, 2] = float("nan")
    return x


@pytest.mark.parametrize(
    ("samples", "config", "options"),
    [
        (nan_samples(), TrainConfig(), {}),
        (torch.zeros(0, 8), TrainConfig(), {}),
        (torch.zeros(8), TrainConfig(), {}),
        (torch.zeros(4, 8, dtype=torch.int64), TrainConfig(), {}),
        (activations(10, 8), TrainConfig(), {"weights": torch.ones(9)}),
        (activations(10, 8), TrainConfig(), {"weights": torch.zeros(10)}),
        (activations(10, 8), TrainConfig(scheme=INT4), {"held_out": torch.ones(10, 7)}),
        (activations(10, 8), TrainConfig(), {"start": torch.eye(7)}),
        (activations(10, 8), TrainConfig(), {"start": 2 * torch.eye(8)}),
        (activations(10, 8), TrainConfig(fix_ones=True), {"start": haar_start(8, 0)}),
        (activations(10, 8), TrainConfig(start="pca-ones", fix_ones=True), {}),
    ],
)
def test_bad_samples_are_refused_with_a_hint(
    samples: Tensor, config: TrainConfig, options: dict[str, Tensor]
) -> None:
    with pytest.raises(RotationError) as error:
        train_rotation(samples, config, **options)  # type: ignore[arg-type]
    assert error.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "newton"},
        {"objective": "hinge"},
        {"objective": "scheme"},
        {"start": "zero"},
        {"update": "adamw"},
        {"update": "adam"},
        {"epochs": -1},
        {"batch_size": 0},
        {"subset": 0.0},
        {"accumulation_steps": 0},
        {"lr": 0.0},
        {"momentum": 1.0},
        {"damping": 0.0},
        {"curvature_fraction": 0.0},
    ],
)
def test_bad_options_are_refused_before_any_work(options: dict[str, object]) -> None:
    with pytest.raises(RotationError) as error:
        TrainConfig(**options)  # type: ignore[arg-type]
    assert error.value.hint


def test_divergence_is_reported_with_a_way_out() -> None:
    overflowing = TrainConfig(objective="lp", p=64.0, normalize=False)
    with pytest.raises(RotationError, match="diverged") as error:
        train_rotation(100 * activations(64, 8), overflowing)
    assert error.value.hint


@pytest.mark.parametrize(
    ("scheme", "fix_ones", "start"),
    [
        (None, False, "hadamard"),
        (ActivationScheme(4), False, "hadamard"),
        (ActivationScheme(4, symmetric=False), False, "pca-ones"),
        (ActivationScheme(4, symmetric=False), True, "hadamard"),
        (ActivationScheme(8, symmetric=False, granularity="tensor"), False, "hadamard"),
        (
            ActivationScheme(4, symmetric=False, granularity="group", group_size=8),
            False,
            "pca-ones",
        ),
    ],
)
def test_a_zero_point_of_each_token_asks_for_a_shift_to_absorb(
    scheme: ActivationScheme | None, fix_ones: bool, start: str
) -> None:
    config = TrainConfig(scheme=scheme, fix_ones=fix_ones, epochs=0)
    assert train_rotation(activations(60, 16), config).start == config.first == start
    assert replace(config, start="identity").first == "identity"


def test_heads_of_one_quantizer_are_trained_and_kept_together() -> None:
    """One large head sets the scale of the token, so that only its range matters, and all heads are
    judged by it.
    """
    kv, group, d = 3, 2, 8
    size = torch.tensor([1.0, 8.0, 1.0]).view(kv, 1, 1)
    train, held = (activations(2, kv, 200 * group, d, seed=seed) * size for seed in (0, 1))
    weights = torch.linspace(1, 2, 200).repeat_interleave(group).expand(2, kv, 200 * group)
    config = TrainConfig(objective="scheme", scheme=INT4, epochs=15)
    joint, alone = (
        train_rotation(
            train, config, weights=weights, held_out=held, held_out_weights=weights, group=together
        )
        for together in (group, None)
    )

    def error(result: TrainResult) -> float:
        whole = whole_inputs(held @ result.matrix.float(), group)
        unit = whole / whole.square().mean(-1, keepdim=True).sqrt()
        return float(scheme_error(unit, INT4, weights=weights[:, 0, ::group]).mean())

    assert_orthogonal(joint.matrix)
    assert error(joint) < error(alone)
    # Measured as the quantizer meets it, tokens at unit power, all heads side by side; the best of
    # each layer is kept.
    assert error(joint) <= min(joint.held_out_errors) * (1 + 1e-4)


def test_without_normalisation_heads_keep_their_sizes() -> None:
    x = activations(2, 3, 40, 8) * 50
    config = TrainConfig(scheme=INT4, epochs=0, objective="lp")
    raw = train_rotation(x, replace(config, normalize=False), group=1).losses[-1]
    assert raw > 20 * train_rotation(x, config, group=1).losses[-1]
    static = replace(config, scheme=ActivationScheme(8, granularity="tensor"))
    scaled = x / x.square().mean((1, 2, 3), keepdim=True).sqrt()
    again = train_rotation(scaled, replace(static, normalize=False), group=1).losses[-1]
    assert train_rotation(x, static, group=1).losses[-1] == pytest.approx(again, rel=1e-5)


def test_the_heads_of_a_token_stay_together_in_batches() -> None:
    """A batch is one of tokens: with what one query head reads put into another one, the loss would
    be another.
    """
    group, tokens = 2, 30
    x = activations(1, 2, tokens * group, 8)
    config = TrainConfig(objective="scheme", scheme=INT4, epochs=1, batch_size=1)
    result = train_rotation(x, replace(config, optimizer="qr", lr=1e-12), group=group)
    start = train_rotation(x, replace(config, epochs=0), group=group)
    assert result.steps == tokens
    # Every token once, and a rotation that hardly moves: the mean over batches is the loss over
    # all.
    assert sum(result.losses[:-1]) / tokens == pytest.approx(start.losses[-1], rel=1e-4)
    assert train_rotation(x, replace(config, batch_size=7), group=group).steps == -(-tokens // 7)


def test_the_number_of_threads_does_not_show() -> None:
    """Of as many tokens and channels as torch and LAPACK share between threads."""
    x = activations(2000, 256)
    config = TrainConfig(scheme=INT4, epochs=3)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(train_rotation(x, config, held_out=x[:500]))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(results[0].matrix, results[1].matrix)
    assert results[0].losses == results[1].losses
    assert results[0].held_out_errors == results[1].held_out_errors


def test_training_that_cannot_win_is_not_taken_to_the_end() -> None:
    """Against no rotation, where channels are uniform: each already fills its range."""
    uniform = [
        torch.rand(2000, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        for seed in (0, 1)
    ]
    config = TrainConfig(objective="scheme", scheme=INT4, epochs=12, look=3, start="identity")
    stopped = train_rotation(uniform[0], config, held_out=uniform[1])
    assert stopped.hopeless
    assert stopped.steps == 3
    whole = train_rotation(uniform[0], replace(config, look=None), held_out=uniform[1])
    assert not whole.hopeless
    assert min(whole.held_out_errors) >= (1 - 0.005) * stopped.held_out_errors[0]

    heavy = train_rotation(activations(800, 16), config, held_out=activations(400, 16, seed=1))
    assert not heavy.hopeless
    assert heavy.steps == 12
