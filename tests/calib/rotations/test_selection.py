"""The gate of one rotation: what is measured, on which tokens, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from calib.capture.result import Provenance, Samples, SiteStatistics
from calib.capture.sites import CaptureConfig
from calib.capture.storage import Capture
from calib.errors import RotationError
from calib.rotations import from_capture, selection
from calib.rotations.from_capture import train_rotations
from calib.rotations.objectives import ActivationScheme, fake_quantize, scheme_error
from calib.rotations.readers import residual_rows, value_rows
from calib.rotations.selection import Judge, Selection, candidates, judge_for, select
from calib.rotations.starts import haar_start
from calib.rotations.train import TrainConfig
from calib.schemes import FLOAT8, scheme_named
from tests.tiny import SIZES, fuse_tiny, make_tiny

INT8 = ActivationScheme(8, granularity="tensor")
# One float32 computation against the same one in another order of summation and reshaping.
SAME = 1e-6


def samples(*shape: int, seed: int = 0, group: int = 1) -> Samples:
    """Heavy-tailed tokens ``[..., entries, n]`` with unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()
    weights = 1 + torch.rand(*shape[:-3], shape[-2], generator=generator)
    if group > 1:  # the entries of one token share its weight
        weights = weights[..., ::group].repeat_interleave(group, dim=-1)
    return Samples(values, weights, massive=0, group=group)


def errors(found: Selection) -> dict[str, float]:
    return {row.candidate: row.error for row in found.table}


def test_an_outlier_channel_asks_for_a_rotation_and_the_lowest_error_wins() -> None:
    train, held = samples(256, 16, seed=1), samples(64, 16, seed=2)
    for part in (train, held):
        part.values[:, 3] *= 50
    found = select("r1", haar_start(16, 0), train, held, Judge(INT8, "int8"), seed=0)
    by_name = errors(found)
    assert list(by_name) == ["identity", "hadamard", "pca-hadamard", "trained"]
    assert by_name[found.name] == min(by_name.values()) < by_name["identity"]
    assert [row.chosen for row in found.table] == [name == found.name for name in by_name]
    assert found.matrix is not None
    assert found.matrix.shape == (16, 16)


def test_where_rotating_hurts_nothing_is_rotated() -> None:
    """Entries of +-1 fit a per-token quantizer exactly; any rotation mixes them into what does not."""
    part = samples(64, 16)
    signs = replace(part, values=part.values.sign())
    found = select("r1", haar_start(16, 0), signs, signs, Judge(ActivationScheme(4), "int4"), seed=0)
    assert (found.name, found.matrix) == ("identity", None)
    assert errors(found)["identity"] < 1e-12 < 1e-4 < errors(found)["trained"]


def test_of_equals_the_simplest_is_kept() -> None:
    part = samples(8, 4)
    silent = replace(part, values=torch.zeros_like(part.values))
    assert select("r1", haar_start(4, 0), silent, silent, Judge(INT8, "int8"), seed=0).name == "identity"


def test_static_limits_come_from_the_training_tokens() -> None:
    train, held = samples(64, 8, seed=1), samples(32, 8, seed=2)
    held.values[0, 0] = 10 * train.values.abs().max()  # clipped by what calibration has seen
    matrix = haar_start(8, 0)
    found = select("r1", matrix, train, held, Judge(INT8, "int8"), seed=0)
    x, seen = held.values @ matrix.float(), train.values @ matrix.float()
    wanted = scheme_error(x, INT8, weights=held.weights, limits=(seen.min(), seen.max()))
    assert errors(found)["trained"] == pytest.approx(float(wanted), rel=SAME)
    own = scheme_error(x, INT8, weights=held.weights)
    assert errors(found)["trained"] > 2 * float(own)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_r2_is_judged_on_the_whole_input_of_the_output_projection(granularity: Any) -> None:
    layers, kv, tokens, group, d = 3, 2, 20, 2, 4
    train, held = (samples(layers, kv, tokens * group, d, seed=seed, group=group) for seed in (1, 2))
    held = replace(held, weights=held.weights.abs())
    matrix = torch.stack([torch.stack([haar_start(d, 10 * i + h) for h in range(kv)]) for i in range(layers)])
    quantizer = ActivationScheme(8, granularity=granularity)
    found = select("r2", matrix, train, held, Judge(quantizer, "int8"), seed=0)
    row = next(row for row in found.table if row.candidate == "trained")
    assert len(row.layers) == layers
    for layer in range(layers):

        def inputs(part: Samples, layer: int = layer) -> Tensor:
            """[tokens, heads * d]: every query head of a KV head's group, rotated by that head's matrix."""
            heads = []
            for head in range(kv):
                rotated = part.values[layer, head] @ matrix[layer, head].float()
                heads += list(rotated.reshape(tokens, group, d).unbind(1))
            return torch.cat(heads, dim=-1)

        limits = (inputs(train).min(), inputs(train).max()) if granularity == "tensor" else None
        weights = held.weights[layer, ::group]
        wanted = float(scheme_error(inputs(held), quantizer, weights=weights, limits=limits))
        assert row.layers[layer] == pytest.approx(wanted, rel=SAME)
    assert row.error == pytest.approx(sum(row.layers) / layers)


def test_weights_alone_are_judged_by_their_own_rows() -> None:
    train, held, rows = samples(64, 16, seed=1), samples(32, 16, seed=2), samples(24, 16, seed=3)
    judge = judge_for(scheme_named("int4-weight-only"), {"r1": rows})
    matrix = haar_start(16, 0)
    found = select("r1", matrix, train, held, judge, seed=0)
    w = rows.values @ matrix.float()
    lost = (fake_quantize(w, ActivationScheme(4, granularity="group", group_size=128)) - w).double().square().sum(-1)
    wanted = float((lost * rows.weights).sum() / (w.double().square().sum(-1) * rows.weights).sum())
    assert errors(found)["trained"] == pytest.approx(wanted, rel=SAME)
    with pytest.raises(RotationError, match="weight rows"):
        judge_for(scheme_named("int4-weight-only"))


def test_a_float_format_is_judged_with_one_static_scale() -> None:
    train, held = samples(64, 8, seed=1), samples(32, 8, seed=2)
    found = select("r1", haar_start(8, 0), train, held, judge_for(scheme_named("float8")), seed=0)
    scale = train.values.abs().max() / FLOAT8.maxbound
    stored = (held.values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    lost = ((stored - held.values).double().square().sum(-1) * held.weights).sum()
    kept = (held.values.double().square().sum(-1) * held.weights).sum()
    assert errors(found)["identity"] == pytest.approx(float(lost / kept), rel=SAME)


def test_every_candidate_of_a_layer_norm_model_fixes_ones() -> None:
    found = candidates(haar_start(12, 0, fix_ones=True), samples(40, 12), seed=0, fix_ones=True)
    ones = torch.ones(12, dtype=torch.float64)
    for matrix in found.values():
        if matrix is not None:
            torch.testing.assert_close(ones @ matrix, ones, rtol=0, atol=1e-12)  # float64 products of order 12


def capture_of(r1: Samples, r2: Samples) -> Capture:
    channels: Any = None
    site = SiteStatistics(channels, torch.empty(0), r1)
    layers = {index: SiteStatistics(channels, torch.empty(0), r2.layer(index)) for index in range(len(r2.values))}
    provenance = Provenance("m", "d", 1, 1, CaptureConfig())
    return Capture(r1=site, sites={}, r2=layers, r2_stack=r2, provenance=provenance)


@pytest.fixture
def tiny_capture() -> Capture:
    """Of a model with 48 channels, 2 layers and 2 KV heads of 8; every sampled token is unlike the others."""
    return capture_of(samples(100, 48, seed=1), samples(2, 2, 60, 8, seed=2, group=3))


def test_train_stop_and_gate_tokens_are_disjoint(tiny_capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}
    train, gate = from_capture.train_rotation, from_capture.select

    def record_training(values: Tensor, *args: Any, held_out: Tensor, **kwargs: Any) -> Any:
        seen["train"], seen["stop"] = [values], [held_out]
        return train(values, *args, held_out=held_out, **kwargs)

    def record_gate(
        rotation: Any, matrix: Tensor, calibrated: Samples, held: Samples, *args: Any, **kwargs: Any
    ) -> Any:
        seen["gate"] = [held.values]
        return gate(rotation, matrix, calibrated, held, *args, **kwargs)

    monkeypatch.setattr(from_capture, "train_rotation", record_training)
    monkeypatch.setattr(from_capture, "select", record_gate)
    tiny = make_tiny(transformers.LlamaConfig(**SIZES))
    config = TrainConfig(epochs=1, scheme=INT8)
    for kind in ("r1", "r2"):
        train_rotations(
            tiny_capture,
            tiny.config,
            tiny.architecture,
            [kind],
            r1=config,
            r2=config,
            held_out=0.2,
            judge=Judge(INT8, ""),
        )
        tokens = {name: set(part[0].flatten(0, -2)[:, 0].tolist()) for name, part in seen.items()}
        assert all(tokens.values())
        assert not tokens["train"] & tokens["stop"]
        assert not (tokens["train"] | tokens["stop"]) & tokens["gate"]
        whole = tiny_capture.r1.samples if kind == "r1" else tiny_capture.stacked_r2()
        assert sum(map(len, tokens.values())) == whole.values[..., 0].numel()


def test_the_table_covers_both_rotations_and_identity_leaves_r1_out(
    tiny_capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny(transformers.LlamaConfig(**SIZES))
    config = TrainConfig(epochs=1)
    given: Any = {"r1": config, "r2": config, "held_out": 0.2}
    kinds = ["r1", "r2", "r4"]
    found = train_rotations(tiny_capture, tiny.config, tiny.architecture, kinds, judge=Judge(INT8, "int8"), **given)
    assert [row.rotation for row in found.table] == ["R1"] * 4 + ["R2"] * 4
    found.rotations.validate(tiny.config, tiny.architecture)

    monkeypatch.setattr(selection, "_error", lambda matrix, *rest: torch.full((2,), 0.0 if matrix is None else 1.0))
    found = train_rotations(tiny_capture, tiny.config, tiny.architecture, kinds, judge=Judge(INT8, "int8"), **given)
    assert found.rotations.kinds() == ("r4",)

    ungated = train_rotations(tiny_capture, tiny.config, tiny.architecture, kinds, **given)
    assert ungated.rotations.kinds() == ("r1", "r2", "r4")
    assert ungated.table == ()


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SIZES),
        transformers.GPT2Config(vocab_size=97, n_embd=48, n_head=4, n_layer=2, n_positions=64),
    ],
    ids=["gqa", "conv1d"],
)
def test_rows_of_the_readers_meet_the_activations_column_by_column(config: Any) -> None:
    fused = fuse_tiny(make_tiny(config))
    specs = list(fused.architecture.all_linears(fused.config))
    outputs = [fused.state[spec.weight] for spec in specs if spec.name.endswith(("o_proj", "attn.c_proj"))]
    rows = value_rows(fused.state, fused.config, fused.architecture)
    assert rows is not None
    seen, _ = selection._seen(None, rows)
    for found, weight in zip(seen, outputs, strict=True):
        assert torch.equal(found, weight.T if "gpt2" in config.model_type else weight)
    residual = residual_rows(fused.state, fused.config, fused.architecture)
    assert residual is not None
    first = fused.state[specs[0].weight]
    wanted = first.T if "gpt2" in config.model_type else first
    assert torch.equal(residual.values[: len(wanted)], wanted)
    # Every matrix counts the same, however large its entries are.
    power = float((residual.values[: len(wanted)].square().mean(-1) * residual.weights[: len(wanted)]).mean())
    assert power == pytest.approx(1, rel=1e-5)
