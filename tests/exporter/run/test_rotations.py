"""From a recipe's scheme to what rotations are trained for and judged by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from calib.rotations.objectives import ActivationScheme
from calib.schemes import scheme_named
from exporter.recipe import load_recipe
from exporter.run.quantizing import customised_scheme
from exporter.run.rotations import activation_scheme, judge_of
from tests.tiny import SIZES, fuse_tiny, make_tiny


@pytest.mark.parametrize(
    ("settings", "quantizer"),
    [
        ({"scheme": "int8"}, ActivationScheme(8, granularity="tensor")),
        ({"scheme": "int8-dynamic"}, ActivationScheme(8)),
        ({"scheme": "w4a4"}, ActivationScheme(4)),
        ({"scheme": "w4a4", "activations.symmetric": False}, ActivationScheme(4, symmetric=False)),
        ({"scheme": "float8"}, None),
        ({"scheme": "int4-weight-only"}, None),
    ],
)
def test_the_trainer_knows_how_activations_are_quantized(
    settings: dict[str, object], quantizer: ActivationScheme | None
) -> None:
    assert activation_scheme(customised_scheme(load_recipe(None, settings))) == quantizer


def test_a_model_is_judged_by_its_weights_too_where_they_are_at_hand() -> None:
    folded = fuse_tiny(make_tiny(transformers.LlamaConfig(**SIZES)))
    scheme = scheme_named("w4a4")
    judge = judge_of(scheme, folded)
    assert (judge.activations, judge.weights, set(judge.rows)) == (
        scheme.activation,
        scheme.weight,
        {"r1", "r2"},
    )
    assert (judge.trained_on, judge.quantizer) == ("both", ActivationScheme(4))
    assert judge_of(scheme, None).weights is None
    only = judge_of(scheme_named("int4-weight-only"), folded)
    assert (only.trained_on, only.quantizer) == (
        "weights",
        ActivationScheme(4, granularity="group", group_size=128),
    )


def test_a_zero_point_reaches_the_judge() -> None:
    scheme = scheme_named("w4a4")
    assert scheme.activation is not None
    asymmetric = replace(scheme, activation=replace(scheme.activation, symmetric=False))
    folded = fuse_tiny(make_tiny(transformers.LlamaConfig(**SIZES)))
    assert judge_of(asymmetric, folded).quantizer == ActivationScheme(4, symmetric=False)
    assert all(
        bool(torch.isfinite(rows.values).all())
        for rows in judge_of(asymmetric, folded).rows.values()
    )
