"""The noise of a static scale is what rounding to it really adds, and says which linears drown."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from calib.arithmetic.inputs import fake_quantize_input
from calib.fusing import materialize
from calib.modules.watch import watching
from calib.schemes import LINEAR_SCHEMES, PerToken
from calib.stats.static_noise import static_noise
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, token_rows

NAME = "model.layers.1.mlp.down_proj"
INT8 = LINEAR_SCHEMES["int8"].input
ROWS = token_rows((48,) * 8, seed=3)


def test_it_is_the_error_of_rounding_a_token_of_median_power() -> None:
    assert INT8 is not None
    model = materialize(fuse_tiny(make_tiny(CONFIGS["llama"]())))
    found = static_noise(model, {NAME: INT8}, ROWS)[NAME]

    seen: list[Tensor] = []
    with watching(model, inputs={NAME: lambda x: seen.append(x.detach().flatten(0, -2))}):
        for row in ROWS:
            model(input_ids=row[None])
    x = torch.cat(seen)
    scale = x.abs().max() / 127
    error = (fake_quantize_input(x, INT8, scale, None) - x).square().mean()
    power = x.square().mean(-1).median()
    # The step is small against the values, so that the error is uniform over it: its mean over
    # thousands of values is that of the formula to a few percent.
    assert found == pytest.approx(float(error / power), rel=0.05)


def test_only_static_integers_have_it() -> None:
    assert INT8 is not None
    model = materialize(fuse_tiny(make_tiny(CONFIGS["llama"]())))
    dynamic = replace(INT8, granularity=PerToken(), dynamic=True)
    float8 = LINEAR_SCHEMES["float8"].input
    assert float8 is not None
    assert static_noise(model, {NAME: dynamic, "lm_head": float8}, ROWS[:1]) == {}
