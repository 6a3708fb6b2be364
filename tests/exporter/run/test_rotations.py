"""From a recipe's scheme to what rotations are trained for and judged by, and which of them a model
can use.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from calib.errors import RotationError, RotqError
from calib.rotations.quantizer import ActivationScheme
from calib.schemes import scheme_named
from exporter.commands.export import export
from exporter.recipe import Recipe, load_recipe
from exporter.run import rotations
from exporter.run.options import RunOptions
from exporter.run.quantizing import customised_scheme
from exporter.run.rotations import activation_scheme, judge_of
from tests.checkpoints import write_checkpoint
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


def odd_width(folder: Path, rotate: str) -> Recipe:
    """A run of a model whose down projections read 45 channels."""
    settings = {
        "model": str(write_checkpoint(folder / "model", intermediate_size=45)),
        "rotate": rotate,
        "calibration.nsamples": 4,
        "calibration.seqlen": 48,
        "gate.nsamples": 2,
        "rotation.r1.epochs": 1,
        "rotation.r2.epochs": 1,
    }
    return load_recipe(None, settings)


@pytest.mark.parametrize(("rotate", "instead"), [("r4", "r1,r2"), ("r1,r2,r4", "r1,r2")])
def test_an_r4_that_would_rotate_nothing_is_refused_before_anything_is_captured(
    rotate: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long_job(*_: object) -> None:
        raise RotqError("it was begun")

    monkeypatch.setattr(rotations, "captured", long_job)
    monkeypatch.setattr("exporter.commands.export.best_candidate", long_job)
    message = "R4 is refused for Llama: its width before the down projection of 45 is odd"
    with pytest.raises(RotationError, match=message) as caught:
        export(odd_width(tmp_path, rotate), RunOptions(tmp_path / "out", verify=False))
    assert caught.value.hint == f"give --rotate {instead}"
    assert not (tmp_path / "out").exists()


def test_auto_leaves_an_r4_out_that_would_rotate_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "exporter"):
        options = RunOptions(tmp_path / "out", verify=False)
        report = export(odd_width(tmp_path, "auto"), options).report
    rotated = [row.rotate for row in report.gate if not row.norms_kept]
    assert rotated == ["none", "r1,r2", "r1,r2, Hadamard"]
    said = [message for message in caplog.messages if "leaves R4 out" in message]
    assert len(said) == 1
    assert "of 45 is odd" in said[0]
