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
from calib.rotations.joint import unit_rows, with_weight_rows
from calib.rotations.quantizer import ActivationScheme, fake_quantize, scheme_error
from calib.rotations.readers import residual_rows, value_rows
from calib.rotations.selection import (
    Judge,
    Selection,
    candidates,
    integer_quantizer,
    judge_for,
    select,
)
from calib.rotations.starts import haar_start
from calib.rotations.train import train_rotation
from calib.rotations.train_config import TrainConfig
from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    PerBlock,
    PerChannel,
    PerTensor,
    PerToken,
    TensorScheme,
    scheme_named,
)
from calib.schemes import INT8 as INT8_FORMAT
from tests.tiny import SIZES, fuse_tiny, make_tiny

INT8 = ActivationScheme(8, granularity="tensor")
STATIC = TensorScheme(INT8_FORMAT, PerTensor())
TOKEN = TensorScheme(INT4, PerToken(), dynamic=True)
# One float32 computation against the same one in another order of summation and reshaping.
SAME = 1e-6


def samples(*shape: int, seed: int = 0, group: int = 1) -> Samples:
    """Heavy-tailed tokens ``[..., entries, n]`` with unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    values = (
        torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()
    )
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
    found = select("r1", haar_start(16, 0), train, held, Judge("int8", STATIC), seed=0)
    by_name = errors(found)
    assert list(by_name) == ["identity", "hadamard", "pca-hadamard", "trained"]
    assert by_name[found.name] == min(by_name.values()) < by_name["identity"]
    assert [row.chosen for row in found.table] == [name == found.name for name in by_name]
    assert found.matrix is not None
    assert found.matrix.shape == (16, 16)


def test_what_is_lower_by_noise_alone_is_not_taken() -> None:
    """The trained matrix is that of Hadamard, turned by a hair: it rounds some tokens better, and
    others worse.
    """
    generator = torch.Generator().manual_seed(1)
    scale = torch.ones(16)
    scale[3] = 8  # so that the identity is far off
    train, held = (
        Samples(torch.randn(tokens, 16, generator=generator) * scale, torch.ones(tokens), massive=0)
        for tokens in (256, 64)
    )
    judge = Judge("int8", TensorScheme(INT8_FORMAT, PerToken(), dynamic=True))
    hadamard = candidates(haar_start(16, 0), train, seed=0)["hadamard"]
    assert hadamard is not None
    lower = []
    for seed in range(6):
        skew = 0.001 * torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).double()
        found = select(
            "r1", hadamard @ torch.linalg.matrix_exp(skew - skew.T), train, held, judge, seed=0
        )
        rows = {row.candidate: row for row in found.table}
        assert found.name == "hadamard"
        for row in rows.values():
            assert row.margin == pytest.approx(row.error - min(errors(found).values()))
            assert row.margin_low <= row.margin <= row.margin_high
        assert rows["identity"].margin_low > 0 >= rows["hadamard"].margin_low
        lower.append(rows["trained"].error < rows["hadamard"].error)
    assert any(lower)
    assert not all(lower)


def test_where_rotating_hurts_nothing_is_rotated() -> None:
    """Entries of +-1 fit a per-token quantizer exactly; any rotation mixes them into what does
    not.
    """
    part = samples(64, 16)
    signs = replace(part, values=part.values.sign())
    found = select("r1", haar_start(16, 0), signs, signs, Judge("int4", TOKEN), seed=0)
    assert (found.name, found.matrix) == ("identity", None)
    assert errors(found)["identity"] < 1e-12 < 1e-4 < errors(found)["trained"]


def test_of_equals_the_simplest_is_kept() -> None:
    part = samples(8, 4)
    silent = replace(part, values=torch.zeros_like(part.values))
    assert (
        select("r1", haar_start(4, 0), silent, silent, Judge("int8", STATIC), seed=0).name
        == "identity"
    )


def test_static_limits_come_from_the_training_tokens() -> None:
    train, held = samples(64, 8, seed=1), samples(32, 8, seed=2)
    held.values[0, 0] = 10 * train.values.abs().max()  # clipped by what calibration has seen
    matrix = haar_start(8, 0)
    found = select("r1", matrix, train, held, Judge("int8", STATIC), seed=0)
    x, seen = held.values @ matrix.float(), train.values @ matrix.float()
    wanted = scheme_error(x, INT8, weights=held.weights, limits=(seen.min(), seen.max()))
    assert errors(found)["trained"] == pytest.approx(float(wanted), rel=SAME)
    own = scheme_error(x, INT8, weights=held.weights)
    assert errors(found)["trained"] > 2 * float(own)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_r2_is_judged_on_the_whole_input_of_the_output_projection(granularity: Any) -> None:
    layers, kv, tokens, group, d = 3, 2, 20, 2, 4
    train, held = (
        samples(layers, kv, tokens * group, d, seed=seed, group=group) for seed in (1, 2)
    )
    held = replace(held, weights=held.weights.abs())
    matrix = torch.stack(
        [torch.stack([haar_start(d, 10 * i + h) for h in range(kv)]) for i in range(layers)]
    )
    quantizer = ActivationScheme(8, granularity=granularity)
    scheme = (
        STATIC if granularity == "tensor" else TensorScheme(INT8_FORMAT, PerToken(), dynamic=True)
    )
    found = select("r2", matrix, train, held, Judge("int8", scheme), seed=0)
    row = next(row for row in found.table if row.candidate == "trained")
    assert len(row.layers) == layers
    for layer in range(layers):

        def inputs(part: Samples, layer: int = layer) -> Tensor:
            """[tokens, heads * d]: every query head of a KV head's group, rotated by that head's
            matrix.
            """
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
    lost = (
        (fake_quantize(w, ActivationScheme(4, granularity="group", group_size=128)) - w)
        .double()
        .square()
        .sum(-1)
    )
    wanted = float((lost * rows.weights).sum() / (w.double().square().sum(-1) * rows.weights).sum())
    assert errors(found)["trained"] == pytest.approx(wanted, rel=SAME)
    with pytest.raises(RotationError, match="weight rows"):
        judge_for(scheme_named("int4-weight-only"))


def test_a_rotation_pays_for_both_errors_of_a_linear() -> None:
    """``e_x + e_W``: with a zero point for activations, without one for weights."""
    train, held, rows = samples(64, 16, seed=1), samples(32, 16, seed=2), samples(24, 16, seed=3)
    activations, weights = (
        TensorScheme(INT4, PerToken(), symmetric=False, dynamic=True),
        TensorScheme(INT4, PerChannel()),
    )
    judge = Judge("both", activations, weights, {"r1": rows})
    matrix = haar_start(16, 0)
    found = select("r1", matrix, train, held, judge, seed=0)
    x = scheme_error(
        held.values @ matrix.float(), ActivationScheme(4, symmetric=False), weights=held.weights
    )
    w = scheme_error(rows.values @ matrix.float(), ActivationScheme(4), weights=rows.weights)
    # float64 against float32 scales of the asymmetric grid: a code may flip at a tie
    assert errors(found)["trained"] == pytest.approx(float(x + w), rel=1e-4)


@pytest.mark.parametrize(
    ("scheme", "trained_on"),
    [("int8", "activations"), ("int8-dynamic", "both"), ("w4a8", "weights"), ("w4a4", "both")],
)
def test_what_makes_most_of_the_error_is_trained_on(scheme: str, trained_on: str) -> None:
    assert judge_for(scheme_named(scheme), {"r1": samples(8, 4)}).trained_on == trained_on
    # there are no rows to train on
    assert judge_for(scheme_named(scheme)).trained_on == "activations"


@pytest.mark.parametrize(
    ("scheme", "quantizer"),
    [
        (
            TensorScheme(INT4, PerToken(), symmetric=False, dynamic=True),
            ActivationScheme(4, symmetric=False),
        ),
        (TensorScheme(INT4, PerChannel()), ActivationScheme(4)),
        (TensorScheme(INT4, PerBlock(8)), ActivationScheme(4, granularity="group", group_size=8)),
        (STATIC, INT8),
        (TensorScheme(FLOAT8, PerTensor()), None),
    ],
)
def test_rotations_are_trained_for_the_quantizer_of_the_scheme(
    scheme: TensorScheme, quantizer: ActivationScheme | None
) -> None:
    """The two agree on every value, so that training and the gate look at one thing."""
    assert integer_quantizer(scheme) == quantizer
    if quantizer is not None:
        x = samples(50, 20, seed=4).values
        found = selection._quantized(x, scheme, x)
        # The same grid by two implementations: no value is a step apart, but for ties.
        assert (
            float(
                (found - fake_quantize(x, quantizer)).abs().gt(1e-5 * x.abs().amax()).float().mean()
            )
            < 2e-3
        )


def test_float_blocks_have_scales_of_their_own() -> None:
    x = samples(10, 32, seed=5).values
    found = selection._quantized(x, TensorScheme(FLOAT4, PerBlock(16), scale_format="e8m0"), x)
    # Rounding up the power of two: nothing is clipped, and a block of E2M1 is off by at most a step
    # of 2 in 6.
    blocks, rounded = x.reshape(10, 2, 16), found.reshape(10, 2, 16)
    assert bool(((blocks - rounded).abs() <= blocks.abs().amax(-1, keepdim=True) * (2 / 6)).all())
    assert float((found - x).square().sum() / x.square().sum()) < 0.05


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
            # float64 products of order 12
            torch.testing.assert_close(ones @ matrix, ones, rtol=0, atol=1e-12)


def capture_of(r1: Samples, r2: Samples) -> Capture:
    channels: Any = None
    site = SiteStatistics(channels, torch.empty(0), r1)
    layers = {
        index: SiteStatistics(channels, torch.empty(0), r2.layer(index))
        for index in range(len(r2.values))
    }
    provenance = Provenance("m", "d", 1, 1, CaptureConfig())
    return Capture(r1=site, sites={}, r2=layers, r2_stack=r2, provenance=provenance)


@pytest.fixture
def tiny_capture() -> Capture:
    """Of a model with 48 channels, 2 layers and 2 KV heads of 8; every sampled token is unlike the
    others.
    """
    return capture_of(samples(100, 48, seed=1), samples(2, 2, 60, 8, seed=2, group=3))


def test_train_stop_and_gate_tokens_are_disjoint(
    tiny_capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {}
    train, gate = train_rotation, select

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
            tiny.wiring,
            [kind],
            r1=config,
            r2=config,
            held_out=0.2,
            judge=Judge("", STATIC),
        )
        tokens = {name: set(part[0].flatten(0, -2)[:, 0].tolist()) for name, part in seen.items()}
        assert all(tokens.values())
        assert not tokens["train"] & tokens["stop"]
        assert not (tokens["train"] | tokens["stop"]) & tokens["gate"]
        whole = tiny_capture.r1.samples if kind == "r1" else tiny_capture.stacked_r2()
        assert sum(map(len, tokens.values())) == whole.values[..., 0].numel()


def test_auto_ends_on_the_error_of_the_quantizer_itself(tiny_capture: Capture) -> None:
    config = TrainConfig(epochs=6)
    judge = Judge("", TOKEN)
    half = from_capture.choose(
        tiny_capture, "r1", replace(config, epochs=3, objective="lp"), 0.2, judge
    ).trained
    whole = from_capture.choose(tiny_capture, "r1", config, 0.2, judge)
    trained = whole.trained
    assert (trained.start, trained.objective, trained.steps) == ("hadamard", "lp then scheme", 6)
    assert trained.held_out_errors[:4] == half.held_out_errors
    assert len(trained.held_out_errors) == 1 + 6
    assert min(trained.held_out_errors) <= min(half.held_out_errors)
    static = from_capture.choose(tiny_capture, "r1", config, 0.2, Judge("", STATIC)).trained
    assert (static.objective, static.steps) == ("lp", 6)


@pytest.mark.parametrize("kind", ["r1", "r2"])
def test_training_sees_what_the_judge_says(
    kind: Any, tiny_capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def record(values: Tensor, config: TrainConfig, **kwargs: Any) -> Any:
        seen.update(kwargs, values=values, config=config)
        return train(values, config, **kwargs)

    train = train_rotation
    monkeypatch.setattr(from_capture, "train_rotation", record)
    rows = {"r1": samples(20, 48, seed=3), "r2": samples(2, 2, 24, 8, seed=4, group=3)}
    weights = TensorScheme(INT4, PerChannel())
    config = TrainConfig(epochs=1)
    kept, _ = tiny_capture.held_out(kind, 0.2)
    part, _ = kept.split(0.2)
    for judge, wanted in (
        (Judge("", TOKEN), part),
        (Judge("", TOKEN, weights, rows), with_weight_rows(part, rows[kind])),
        (Judge("", None, weights, rows), unit_rows(rows[kind])),
    ):
        from_capture.choose(tiny_capture, kind, config, 0.2, judge)
        assert torch.equal(seen["values"], wanted.values)
        assert seen["config"].scheme == ActivationScheme(4)
        assert seen["group"] == (3 if kind == "r2" else None)
    # as published: head by head, on activations
    from_capture.choose(tiny_capture, kind, config, 0.2, None)
    assert (seen["group"], seen["config"]) == (None, config)


def test_the_table_covers_both_rotations_and_identity_leaves_r1_out(
    tiny_capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny(transformers.LlamaConfig(**SIZES))
    config = TrainConfig(epochs=1)
    given: Any = {"r1": config, "r2": config, "held_out": 0.2}
    kinds = ["r1", "r2", "r4"]
    found = train_rotations(tiny_capture, tiny.wiring, kinds, judge=Judge("int8", STATIC), **given)
    assert [row.rotation for row in found.table] == ["R1"] * 4 + ["R2"] * 4
    found.rotations.validate(tiny.wiring)

    monkeypatch.setattr(
        selection,
        "_parts",
        lambda matrix, *rest: [torch.full((2, 3), 0.0 if matrix is None else 1.0)],
    )
    found = train_rotations(tiny_capture, tiny.wiring, kinds, judge=Judge("int8", STATIC), **given)
    assert found.rotations.kinds() == ("r4",)

    rows = {"r1": samples(20, 48, seed=3), "r2": samples(2, 2, 24, 8, seed=4, group=3)}
    judge = Judge("both", TOKEN, TensorScheme(INT4, PerChannel()), rows)
    found = train_rotations(tiny_capture, tiny.wiring, kinds, judge=judge, **given)
    assert {row.measure for row in found.table} == {"both"}
    assert [curve.rotation for curve in found.training] == ["R1", "R2"]
    for curve in found.training:
        # before each step, and last that of the result
        assert len(curve.losses) == given["r1"].epochs + 1
        assert len(curve.held_out_errors) == given["r1"].epochs + 1

    ungated = train_rotations(tiny_capture, tiny.wiring, kinds, **given)
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
    specs = list(fused.wiring.linears)
    outputs = [
        fused.state[spec.weight] for spec in specs if spec.name.endswith(("o_proj", "attn.c_proj"))
    ]
    rows = value_rows(fused.state, fused.wiring)
    assert rows is not None
    seen, _ = selection._seen(None, rows)
    for found, weight in zip(seen, outputs, strict=True):
        assert torch.equal(found, weight)
    residual = residual_rows(fused.state, fused.wiring)
    assert residual is not None
    first = fused.state[specs[0].weight]
    assert torch.equal(residual.values[: len(first)], first)
    # Every matrix counts the same, however large its entries are.
    power = float(
        (residual.values[: len(first)].square().mean(-1) * residual.weights[: len(first)]).mean()
    )
    assert power == pytest.approx(1, rel=1e-5)
