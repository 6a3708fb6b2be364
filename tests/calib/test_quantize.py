"""From a fused model to the artifact: every integer, scale and reason against the fused weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calib.architectures import Space
from calib.artifact import QuantizedModel
from calib.errors import QuantizationError
from calib.fusing import FusedModel, materialize
from calib.kept import KEPT_EXPERTS, KEPT_HEAD, KEPT_ROUTER
from calib.scales import dequantize, expand_scale
from calib.schemes import SCHEMES, scheme_named
from tests.tiny import CONFIGS, PROVENANCE, fuse_tiny, make_tiny, quantize_fused, token_rows
from tests.tolerances import half_step

MODELS = ["llama", "llama-bias-tied-headdim", "llama-odd", "gpt2", "gpt2-untied-inner", "qwen2", "opt-nobias"]


@pytest.fixture(scope="module", params=[("int8", name) for name in MODELS] + [("int4-weight-only", "gpt2")], ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[FusedModel, QuantizedModel]:
    scheme, name = request.param
    fused = fuse_tiny(make_tiny(CONFIGS[name]()), ["r1", "r2", "r4"])
    return fused, quantize_fused(fused, scheme)


def test_weights_are_within_half_a_step_of_the_fused_ones(pair: tuple[FusedModel, QuantizedModel]) -> None:
    fused, quantized = pair
    for spec in fused.architecture.all_linears(fused.config):
        if spec.name not in quantized.linears:
            continue
        linear = quantized.linears[spec.name]
        stored = fused.state[spec.weight]
        weight = stored.T if spec.layout == "conv1d" else stored
        assert linear.weight.shape == weight.shape  # [out, in], also where the model stores [in, out]
        steps = expand_scale(linear.weight_scale, weight.shape, linear.weight_scheme.granularity)
        error = (dequantize(linear.weight, linear.weight_scale, linear.weight_scheme) - weight).abs()
        assert bool((error <= steps * half_step(linear.weight_scheme.format.maxbound)).all()), spec.name
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


def test_only_down_projections_name_an_online_rotation(pair: tuple[FusedModel, QuantizedModel]) -> None:
    fused, quantized = pair
    for spec in fused.architecture.all_linears(fused.config):
        if spec.name in quantized.linears:
            expected = f"R4.{spec.layer}" if spec.reads is Space.FFN else None
            assert quantized.linears[spec.name].online_rotation == expected
            assert expected is None or quantized.rotations[expected].online


def test_every_tensor_is_either_quantized_or_float(pair: tuple[FusedModel, QuantizedModel]) -> None:
    fused, quantized = pair
    linear = {f"{name}.weight" for name in quantized.linears}
    linear |= {f"{name}.bias" for name, entry in quantized.linears.items() if entry.bias is not None}
    assert set(quantized.floats) | linear == set(fused.state)
    assert not set(quantized.floats) & linear
    assert quantized.config["tie_word_embeddings"] is False
    assert quantized.kept == {fused.architecture.head.name: KEPT_HEAD}


def test_without_r4_no_linear_names_a_rotation() -> None:
    quantized = quantize_fused(fuse_tiny(make_tiny(CONFIGS["llama"]()), ["r1", "r2"]), "int8-weight-only")
    assert {linear.online_rotation for linear in quantized.linears.values()} == {None}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_and_routers_stay_float_with_a_reason(name: str) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS[name]()))
    quantized = quantize_fused(fused, "int8")
    experts = fused.architecture.expert_parameters(fused.config)
    assert experts
    for parameter in experts:
        assert quantized.kept[parameter] == KEPT_EXPERTS
        assert torch.equal(quantized.floats[parameter], fused.state[parameter])
    routers = {name for name, reason in quantized.kept.items() if reason == KEPT_ROUTER}
    assert routers
    assert all("gate" in name for name in routers)
    assert quantized.kept["lm_head"] == KEPT_HEAD
    assert all("experts." not in name or "shared" in name for name in quantized.linears)


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
    with pytest.raises(QuantizationError, match=r"NaN or Inf in the weights of model\.layers\.1\.mlp\.up_proj"):
        quantize_fused(fused, "int8-weight-only")


def test_the_scheme_decides_and_the_provenance_is_kept() -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()))
    for name in SCHEMES:
        quantized = quantize_fused(fused, name)
        assert quantized.scheme is scheme_named(name)
        assert quantized.provenance == PROVENANCE
        assert {linear.weight_scheme for linear in quantized.linears.values()} == {quantized.scheme.weight}
