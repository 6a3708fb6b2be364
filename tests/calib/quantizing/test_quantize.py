"""From a fused model to the artifact: every integer, scale and reason against the fused weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.architectures import Space
from calib.arithmetic.grids import expand_grid
from calib.artifact import QuantizedModel, load_artifact, save_artifact
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.errors import DataError, QuantizationError
from calib.fusing import FusedModel, materialize
from calib.measure.reference import build_reference
from calib.quantizing.calibrator import KEPT_HEAD, KEPT_ROUTER, quantize_model
from calib.quantizing.plan import customised, resolve
from calib.schemes import SCHEMES, scheme_named
from tests.tiny import (
    CONFIGS,
    PROVENANCE,
    fuse_tiny,
    make_tiny,
    quantize_fused,
    relative_l2,
    token_rows,
    wide_llama,
)
from tests.tolerances import half_step

MODELS = [
    "llama",
    "llama-bias-tied-headdim",
    "llama-odd",
    "gpt2",
    "gpt2-untied-inner",
    "qwen2",
    "opt-nobias",
]


@pytest.fixture(
    scope="module",
    params=[("int8", name) for name in MODELS] + [("int4-weight-only", "gpt2")],
    ids=str,
)
def pair(request: pytest.FixtureRequest) -> tuple[FusedModel, QuantizedModel]:
    scheme, name = request.param
    fused = fuse_tiny(make_tiny(CONFIGS[name]()), ["r1", "r2", "r4"])
    return fused, quantize_fused(fused, scheme)


def test_weights_are_within_half_a_step_of_the_fused_ones(
    pair: tuple[FusedModel, QuantizedModel],
) -> None:
    fused, quantized = pair
    for spec in fused.wiring.linears:
        if spec.name not in quantized.linears:
            continue
        linear = quantized.linears[spec.name]
        weight = fused.state[spec.weight]
        assert linear.weight.shape == weight.shape
        steps, _ = expand_grid(linear.grid, weight.shape, linear.weight_scheme.granularity)
        error = (linear.values() - weight).abs()
        assert bool((error <= steps * half_step(linear.weight_scheme.format.maxbound)).all()), (
            spec.name
        )
        bias = fused.state.get(f"{spec.name}.bias")
        assert (linear.bias is None) == (bias is None)
        assert bias is None or (linear.bias is not None and torch.equal(linear.bias, bias))


def input_maxima(model: nn.Module, names: list[str]) -> dict[str, float]:
    """Largest magnitude that enters each linear, after the hooks of its online rotation."""
    found = dict.fromkeys(names, 0.0)

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = max(found[name], float(args[0].abs().max()))

        return look

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for row in token_rows():
            model(input_ids=row[None])
    return found


def test_input_scales_are_amax_over_127(pair: tuple[FusedModel, QuantizedModel]) -> None:
    fused, quantized = pair
    maxima = input_maxima(materialize(fused), list(quantized.linears))
    for name, linear in quantized.linears.items():
        if quantized.scheme.weight_only:
            assert linear.input_scale is None
            assert linear.input_scheme is None
            continue
        assert linear.input_scale is not None
        assert linear.input_scale.shape == ()
        # rows were batched for the calibration, which moves a sum by a few eps
        assert float(linear.input_scale) == pytest.approx(maxima[name] / 127, rel=1e-4), name


def test_only_down_projections_name_an_online_rotation(
    pair: tuple[FusedModel, QuantizedModel],
) -> None:
    fused, quantized = pair
    for spec in fused.wiring.linears:
        if spec.name in quantized.linears:
            expected = f"R4.{spec.layer}" if spec.reads is Space.FFN else None
            assert quantized.linears[spec.name].online_rotation == expected
            assert expected is None or quantized.rotations[expected].online


def test_every_tensor_is_either_quantized_or_float(pair: tuple[FusedModel, QuantizedModel]) -> None:
    fused, quantized = pair
    linear = {f"{name}.weight" for name in quantized.linears}
    linear |= {
        f"{name}.bias" for name, entry in quantized.linears.items() if entry.bias is not None
    }
    assert set(quantized.floats) | linear == set(fused.state)
    assert not set(quantized.floats) & linear
    assert quantized.config["tie_word_embeddings"] is False
    assert quantized.kept == {fused.wiring.head.name: KEPT_HEAD}


def test_without_r4_no_linear_names_a_rotation() -> None:
    quantized = quantize_fused(
        fuse_tiny(make_tiny(CONFIGS["llama"]()), ["r1", "r2"]), "int8-weight-only"
    )
    assert {linear.online_rotation for linear in quantized.linears.values()} == {None}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_routers_and_gates_stay_float_with_a_reason(name: str) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS[name]()))
    quantized = quantize_fused(fused, "int8")
    routers = {name for name, reason in quantized.kept.items() if reason == KEPT_ROUTER}
    assert routers
    assert all("gate" in name for name in routers)
    assert quantized.kept == dict.fromkeys(routers, KEPT_ROUTER) | {"lm_head": KEPT_HEAD}
    for router in routers:
        assert torch.equal(quantized.floats[f"{router}.weight"], fused.state[f"{router}.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_and_floats_have_the_compute_dtype(dtype: torch.dtype) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()), dtype=dtype)
    quantized = quantize_fused(fused, "int8")
    assert quantized.dtype == dtype
    tensors = [*quantized.floats.values()]
    for linear in quantized.linears.values():
        assert linear.input_scale is not None
        tensors += [linear.weight_scale, linear.input_scale]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    assert all(bool((linear.weight_scale > 0).all()) for linear in quantized.linears.values())


def test_a_dead_output_channel_keeps_a_positive_scale() -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()))
    name = "model.layers.0.mlp.up_proj"
    fused.state[f"{name}.weight"][3] = 0.0
    linear = quantize_fused(fused, "int8").linears[name]
    assert float(linear.weight_scale[3]) == torch.finfo(torch.float32).tiny
    assert not linear.weight[3].any()


def test_a_weight_that_is_not_finite_is_named() -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()))
    fused.state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    with pytest.raises(
        QuantizationError, match=r"weights of 'model\.layers\.1\.mlp\.up_proj' hold NaN or Inf"
    ):
        quantize_fused(fused, "int8-weight-only")


def test_the_scheme_decides_and_survives_saving(tmp_path: Path) -> None:
    errors: dict[str, float] = {}
    fused = fuse_tiny(make_tiny(wide_llama()), ["r1", "r2", "r4"])
    original = materialize(fused)
    ids = torch.stack(token_rows([11, 11]))
    expected = original(input_ids=ids).logits
    for name in SCHEMES:
        quantized = quantize_fused(fused, name)
        assert quantized.scheme is scheme_named(name)
        assert quantized.provenance == PROVENANCE
        assert set(quantized.schemes().values()) == {quantized.scheme.linear} - {None}
        folder = tmp_path / name
        folder.mkdir()
        save_artifact(quantized, folder)
        loaded = build_reference(load_artifact(folder))(input_ids=ids).logits
        assert torch.equal(loaded, build_reference(quantized)(input_ids=ids).logits)
        # these weights are random and large: what counts is that coarser formats are worse, in this
        # order
        errors[name] = relative_l2(loaded, expected)
    assert errors["float"] < 1e-5  # the fold and the online rotation alone
    assert (
        errors["int8-weight-only"]
        < errors["int8"]
        < errors["float8"]
        < errors["w4a8"]
        < errors["w4a4"]
    )
    assert errors["int8-dynamic"] < errors["int8"]
    assert errors["mxfp8"] < errors["nvfp4"] < errors["mxfp4"]


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_formats_with_fixed_blocks_name_the_linears_that_do_not_fit(scheme: str) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()))
    with pytest.raises(
        QuantizationError,
        match=r"do not divide the .* input features of .*layers\.1\.mlp\.down_proj",
    ) as e:
        quantize_fused(fused, scheme)
    assert "--override" in str(e.value.hint)


def quantized_with(
    config: Any, scheme: str = "int8", **settings: Any
) -> tuple[FusedModel, QuantizedModel]:
    fused = fuse_tiny(make_tiny(config), ["r1", "r2"])
    how = resolve(scheme_named(scheme), fused.wiring, **settings)
    loop = forward_loop_over(length_batches(token_rows(), 4))
    return fused, quantize_model(fused, how, loop, PROVENANCE)


def test_overrides_reach_the_artifact_and_survive_saving(tmp_path: Path) -> None:
    overrides = {"*.0.*": "float", "*.1.mlp.*": "int4-weight-only", "lm_head": "int8-weight-only"}
    overrides |= {"model.embed_tokens": "int8-weight-only"}
    fused, quantized = quantized_with(CONFIGS["llama"](), overrides=overrides)
    assert "model.layers.0.mlp.up_proj" in quantized.kept
    assert torch.equal(
        quantized.floats["model.layers.0.mlp.up_proj.weight"],
        fused.state["model.layers.0.mlp.up_proj.weight"],
    )
    assert quantized.linears["model.layers.1.mlp.up_proj"].input_scheme is None
    assert "lm_head" not in quantized.kept
    assert "lm_head.weight" not in quantized.floats
    save_artifact(quantized, tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.schemes() == quantized.schemes()
    ids = torch.stack(token_rows([11, 11]))
    found = build_reference(loaded)(input_ids=ids).logits
    assert torch.equal(found, build_reference(quantized)(input_ids=ids).logits)
    embeddings: Any = build_reference(loaded).get_input_embeddings()  # type: ignore[operator]
    table = embeddings.weight
    step = quantized.linears["model.embed_tokens"].weight_scale[:, None]
    assert bool(
        ((table - fused.state["model.embed_tokens.weight"]).abs() <= step * half_step(127)).all()
    )


def test_zero_points_survive_saving(tmp_path: Path) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()), ["r1", "r2"])
    scheme = customised(scheme_named("int8"), weight_symmetric=False, activation_symmetric=False)
    how = resolve(scheme, fused.wiring)
    quantized = quantize_model(
        fused, how, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
    )
    for linear in quantized.linears.values():
        assert linear.weight_zero_point is not None
        assert linear.input_zero_point is not None
        steps, _ = expand_grid(linear.grid, linear.weight.shape, linear.weight_scheme.granularity)
        weight = fused.state[f"{linear.name}.weight"]
        # half a step of rounding, half a step of the zero point's own rounding
        assert bool(((linear.values() - weight).abs() <= steps * 2 * half_step(127)).all())
    save_artifact(quantized, tmp_path)
    ids = torch.stack(token_rows([11, 11]))
    found = build_reference(load_artifact(tmp_path))(input_ids=ids).logits
    assert torch.equal(found, build_reference(quantized)(input_ids=ids).logits)
    assert relative_l2(found, materialize(fused)(input_ids=ids).logits) < 0.1


@pytest.mark.parametrize("algorithm", ["gptq", "adaround:iterations=50", "mse"])
def test_weight_algorithms_stay_on_their_grids(algorithm: str) -> None:
    _, quantized = quantized_with(CONFIGS["gpt2"](), "int4-weight-only", weights=algorithm)
    for linear in quantized.linears.values():
        assert linear.weight.dtype == torch.int8
        assert int(linear.weight.min()) >= -8
        assert int(linear.weight.max()) <= 7
    build_reference(quantized)


def test_nothing_is_run_where_nothing_has_to_be_seen() -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()))
    how = resolve(scheme_named("w4a4"), fused.wiring)
    assert quantize_model(fused, how, None, PROVENANCE).linears
    static = resolve(scheme_named("int8"), fused.wiring)
    with pytest.raises(DataError, match="needs calibration data"):
        quantize_model(fused, static, None, PROVENANCE)
