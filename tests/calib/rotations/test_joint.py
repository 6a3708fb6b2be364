"""Training on weights and activations together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calib.errors import RotationError
from calib.rotations.joint import with_weight_rows
from calib.rotations.objectives import ActivationScheme, scheme_error
from calib.rotations.train import TrainConfig, train_rotation


def heavy_tailed(rows: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, n, generator=generator) * torch.randn(rows, n, generator=generator).exp()
    mixing = torch.randn(n, n, generator=torch.Generator().manual_seed(seed + 50)) / n**0.5
    mixed: Tensor = features @ mixing
    return mixed


def test_rows_carry_the_power_of_the_samples_and_the_asked_share_of_the_weight() -> None:
    x, readers = heavy_tailed(100, 8, 0), [heavy_tailed(24, 8, 1), 1e-3 * heavy_tailed(40, 8, 2), torch.zeros(5, 8)]
    samples, weights = with_weight_rows(x, readers, weights=torch.linspace(1, 3, 100), share=0.5)
    assert samples.shape == (164, 8)
    assert torch.equal(samples[:100], x)
    mean_square = x.square().mean()
    torch.testing.assert_close(samples[100:].square().mean(-1), mean_square.expand(64))
    torch.testing.assert_close(weights[100:].sum(), 0.5 * weights[:100].sum())
    for block, reader in ((weights[100:124], readers[0]), (weights[124:], readers[1])):
        power = reader.square().sum(-1)
        torch.testing.assert_close(block / block.sum(), power / power.sum())


def test_the_joint_rotation_serves_the_weights_better_than_one_trained_on_activations() -> None:
    x, w = heavy_tailed(2000, 16, 0), heavy_tailed(600, 16, 1)
    scheme = ActivationScheme(4)
    config = TrainConfig(objective="scheme", scheme=scheme, epochs=20)
    alone = train_rotation(x, config).matrix.float()
    samples, weights = with_weight_rows(x, [w])
    joint = train_rotation(samples, config, weights=weights).matrix.float()

    def errors(matrix: Tensor) -> tuple[float, float]:
        return float(scheme_error(x @ matrix, scheme)), float(scheme_error(w @ matrix, scheme))

    assert errors(joint)[1] < errors(alone)[1]
    assert sum(errors(joint)) < sum(errors(alone))


def test_bad_input_is_refused_with_a_hint() -> None:
    x = torch.ones(4, 8)
    for call in (
        lambda: with_weight_rows(x, [torch.ones(3, 7)]),
        lambda: with_weight_rows(x[None], [torch.ones(3, 8)]),
        lambda: with_weight_rows(x, [torch.zeros(3, 8)]),
        lambda: with_weight_rows(x, [torch.ones(3, 8)], share=0.0),
    ):
        with pytest.raises(RotationError) as error:
            call()
        assert error.value.hint
