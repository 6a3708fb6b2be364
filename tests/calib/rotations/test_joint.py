"""Training on weights and activations together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from calib.capture.result import Samples
from calib.errors import RotationError
from calib.rotations.joint import unit_rows, with_weight_rows
from calib.rotations.objectives import whole_inputs
from calib.rotations.quantizer import ActivationScheme, scheme_error
from calib.rotations.train import train_rotation
from calib.rotations.train_config import TrainConfig


def heavy_tailed(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = (
        torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    )
    mixing = (
        torch.randn(shape[-1], shape[-1], generator=torch.Generator().manual_seed(seed + 50))
        / shape[-1] ** 0.5
    )
    mixed: Tensor = features @ mixing
    return mixed


def samples(values: Tensor, group: int = 1) -> Samples:
    """With weights that differ from token to token."""
    shape = (*values.shape[:-3], values.shape[-2] // group)
    weights = torch.linspace(1, 3, shape[-1]).expand(shape).repeat_interleave(group, dim=-1)
    return Samples(values, weights, massive=0, group=group)


def test_rows_carry_the_power_of_the_samples_and_the_asked_share_of_the_weight() -> None:
    tokens, rows = samples(heavy_tailed(100, 8, seed=0)), samples(heavy_tailed(24, 8, seed=1))
    rows.values[3] = 0.0
    both = with_weight_rows(tokens, rows, share=0.5)
    assert both.values.shape == (124, 8)
    assert torch.equal(both.values[:100], tokens.values)
    power = both.values[100:].square().mean(-1)
    used = torch.arange(24) != 3
    torch.testing.assert_close(power[used], tokens.values.square().mean().expand(23))
    torch.testing.assert_close(both.weights[100:].sum(), 0.5 * tokens.weights.sum())
    # A row counts by its own power, and by the weight that its matrix has.
    share = rows.values.square().sum(-1) * rows.weights
    torch.testing.assert_close(
        both.weights[100:][used], (share / share.sum() * 0.5 * tokens.weights.sum())[used]
    )
    # A row of zeros quantizes exactly; it stays, with a weight that is positive and does not count.
    assert 0 < both.weights[103] < 1e-6 * both.weights.sum()
    assert not both.values[103].any()


def test_a_row_of_the_output_projection_is_all_heads_side_by_side() -> None:
    layers, kv, group, d = 3, 2, 2, 4
    tokens = samples(heavy_tailed(layers, kv, 10 * group, d, seed=0), group)
    rows = samples(
        heavy_tailed(layers, kv, 6 * group, d, seed=1) * torch.tensor([1.0, 9.0]).view(2, 1, 1),
        group,
    )
    both = with_weight_rows(tokens, rows)
    assert (both.group, both.values.shape) == (group, (layers, kv, 16 * group, d))
    whole, given = whole_inputs(both.values, group)[:, 10:], whole_inputs(rows.values, group)
    # One factor for all heads: their proportions are what the quantizer meets.
    factor = whole / given
    torch.testing.assert_close(factor, factor[..., :1].expand_as(factor))
    torch.testing.assert_close(
        whole.square().mean(-1), tokens.values.square().mean((1, 2, 3))[:, None].expand(layers, 6)
    )
    torch.testing.assert_close(both.weights[:, 10 * group :].sum(-1), tokens.weights.sum(-1))
    assert torch.equal(both.weights[:, 0::group], both.weights[:, 1::group])


def test_weighted_unit_rows_have_the_relative_error_of_the_weight() -> None:
    """A quantizer with a scale for every row does not see the row's size; the weight puts it
    back.
    """
    rows = samples(heavy_tailed(40, 8, seed=1))
    unit = unit_rows(rows)
    torch.testing.assert_close(unit.values.square().mean(-1), torch.ones(40))
    scheme = ActivationScheme(4)
    wanted = scheme_error(rows.values, scheme, weights=rows.weights)
    torch.testing.assert_close(
        scheme_error(unit.values, scheme, weights=unit.weights), wanted, rtol=1e-5, atol=0
    )


def test_the_joint_rotation_serves_the_weights_better_than_one_trained_on_activations() -> None:
    x, w = samples(heavy_tailed(2000, 16, seed=0)), samples(heavy_tailed(600, 16, seed=1))
    scheme = ActivationScheme(4)
    config = TrainConfig(objective="scheme", scheme=scheme, epochs=20)
    alone = train_rotation(x.values, config).matrix.float()
    both = with_weight_rows(x, w)
    joint = train_rotation(both.values, config, weights=both.weights).matrix.float()

    def errors(matrix: Tensor) -> tuple[float, float]:
        return float(scheme_error(x.values @ matrix, scheme)), float(
            scheme_error(w.values @ matrix, scheme)
        )

    assert errors(joint)[1] < errors(alone)[1]
    assert sum(errors(joint)) < sum(errors(alone))


def test_bad_input_is_refused_with_a_hint() -> None:
    x = samples(torch.ones(4, 8))
    for rows, share in (
        (samples(torch.ones(3, 7)), 1.0),
        (samples(torch.ones(2, 2, 3, 8)), 1.0),
        (replace(x, group=2), 1.0),
        (samples(torch.zeros(3, 8)), 1.0),
        (x, 0.0),
    ):
        with pytest.raises(RotationError) as error:
            with_weight_rows(x, rows, share=share)
        assert error.value.hint
