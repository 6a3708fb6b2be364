"""Experts of 3-D parameters: every one a linear of its own, calibrated on the tokens that are
routed to it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from calib.architectures import wiring_for
from calib.arithmetic.grids import expand_grid
from calib.artifact import QuantizedModel, load_artifact, save_artifact
from calib.data.batches import length_batches
from calib.data.forward_loop import ForwardLoop, forward_loop_over
from calib.errors import QuantizationError
from calib.fusing import FusedModel, materialize
from calib.measure.floor import split_logits
from calib.measure.reference import build_reference
from calib.network.observe_experts import experts_as_modules
from calib.quantizing.calibrator import Calibrator, quantize_model
from calib.quantizing.observation import Observed, observe
from calib.quantizing.plan import KEPT_BY_OVERRIDE, customised, resolve
from calib.schemes import scheme_named
from calib.weights.rounded import row_errors
from tests.tiny import (
    CONFIGS,
    LENGTHS,
    MOE,
    PROVENANCE,
    SIZES,
    Tiny,
    fuse_tiny,
    make_tiny,
    quantize_fused,
    relative_l2,
    token_rows,
)
from tests.tolerances import SAME_SUMS, WEIGHT_ONLY, half_step

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]
EXPERTS, CHOSEN = 4, 2  # of every tiny family
KINDS: Any = ("r1", "r2", "r3", "r4")


def loop() -> ForwardLoop:
    return forward_loop_over(length_batches(token_rows(), 4))


def quantized_with(
    fused: FusedModel,
    scheme: str = "int8",
    forward_loop: ForwardLoop | None = None,
    **settings: Any,
) -> QuantizedModel:
    how = resolve(scheme_named(scheme), fused.wiring, **settings)
    return quantize_model(fused, how, forward_loop or loop(), PROVENANCE)


def observed(fused: FusedModel, scheme: str = "int8", **settings: Any) -> Observed:
    how = resolve(scheme_named(scheme), fused.wiring, **settings)
    return observe(materialize(fused), Calibrator(fused, how).watchlist(list(how.linears)), loop())


@pytest.fixture(scope="module", params=FAMILIES)
def fused(request: pytest.FixtureRequest) -> FusedModel:
    return fuse_tiny(make_tiny(CONFIGS[request.param]()), KINDS)


@pytest.fixture(scope="module")
def quantized(fused: FusedModel) -> QuantizedModel:
    return quantize_fused(fused, "int8")


def expert_names(fused: FusedModel) -> list[str]:
    parameters = fused.wiring.expert_parameters
    return [f"{parameter}.{expert}" for parameter in parameters for expert in range(EXPERTS)]


def test_every_expert_is_a_linear_within_half_a_step(
    fused: FusedModel, quantized: QuantizedModel
) -> None:
    for name in expert_names(fused):
        parameter, _, expert = name.rpartition(".")
        weight, linear = fused.state[parameter][int(expert)], quantized.linears[name]
        steps, _ = expand_grid(linear.grid, weight.shape, linear.weight_scheme.granularity)
        assert bool(((linear.values() - weight).abs() <= steps * half_step(127)).all()), name
        layer = parameter.split(".")[2]
        assert linear.online_rotation == (
            f"R4.{layer}" if parameter.endswith("down_proj") else None
        )
        assert linear.bias is None


def test_experts_are_in_topological_order_and_their_parameters_gone(
    fused: FusedModel, quantized: QuantizedModel
) -> None:
    names = [name for name in quantized.linears if ".experts." in name]
    assert names == expert_names(fused)
    parameters = set(fused.wiring.expert_parameters)
    assert not parameters & (quantized.floats.keys() | quantized.kept.keys())
    linear = {f"{name}.weight" for name in quantized.linears} | {
        f"{name}.bias" for name in quantized.linears
    }
    assert fused.state.keys() - linear - parameters == quantized.floats.keys()


@torch.no_grad()
def routed_inputs(fused: FusedModel) -> dict[str, list[Tensor]]:
    """What enters each expert, token by token: the decoder layer written out, with no hook and no
    loop of rotq's.
    """
    model, state = materialize(fused), fused.state
    found: dict[str, list[Tensor]] = defaultdict(list)
    for row in token_rows():
        hidden = model(input_ids=row[None], output_hidden_states=True).hidden_states
        positions = model.model.rotary_emb(hidden[0], torch.arange(len(row))[None])
        for index, layer in enumerate(model.model.layers):
            path = f"model.layers.{index}.mlp"
            if f"{path}.experts.down_proj" not in state:
                continue
            attended, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(hidden[index]),
                position_embeddings=positions,
                attention_mask=None,  # causal
            )
            rotation = fused.rotations[f"R4.{index}"].dense().float()
            for x in layer.post_attention_layernorm(hidden[index] + attended)[0]:
                for expert in (state[f"{path}.gate.weight"] @ x).topk(CHOSEN).indices.tolist():
                    gate, up = (state[f"{path}.experts.gate_up_proj"][expert] @ x).chunk(2)
                    found[f"{path}.experts.gate_up_proj.{expert}"].append(x)
                    found[f"{path}.experts.down_proj.{expert}"].append(
                        gate * gate.sigmoid() * up @ rotation
                    )
    return found


def test_input_scales_are_amax_over_the_tokens_of_the_expert(
    fused: FusedModel, quantized: QuantizedModel
) -> None:
    inputs = routed_inputs(fused)
    assert sorted(inputs) == sorted(expert_names(fused))
    for name, tokens in inputs.items():
        scale = quantized.linears[name].input_scale
        assert scale is not None
        # sums in another order move an amax by a few eps; another token, or expert, by per cents
        assert float(scale) == pytest.approx(
            float(torch.stack(tokens).abs().max()) / 127, rel=1e-5
        ), name


def test_tokens_and_moments_are_those_of_the_expert(fused: FusedModel) -> None:
    inputs = routed_inputs(fused)
    found = observed(fused, weights="gptq")
    for path, counts in found.tokens.items():
        assert sum(counts) == CHOSEN * sum(LENGTHS)
        assert counts == tuple(
            len(inputs[f"{path}.down_proj.{expert}"]) for expert in range(EXPERTS)
        )
    for name, tokens in inputs.items():
        x = torch.stack(tokens).double()
        assert relative_l2(found.moments[name], x.T @ x / len(x)) <= SAME_SUMS, name


def test_observing_leaves_the_model_as_it_was(fused: FusedModel) -> None:
    model, ids = materialize(fused), torch.stack(token_rows([11, 11]))
    kinds, before = [type(module) for module in model.modules()], model(input_ids=ids).logits
    with experts_as_modules(model, expert_names(fused)) as experts:
        assert len(experts) == len(expert_names(fused)) // (2 * EXPERTS)
        for name in expert_names(fused):  # the memory of the parameter, not a copy
            parameter, _, expert = name.rpartition(".")
            assert (
                model.get_submodule(name).weight.data_ptr()
                == fused.state[parameter][int(expert)].data_ptr()
            )
        assert relative_l2(model(input_ids=ids).logits, before) <= SAME_SUMS
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(input_ids=ids).logits, before)


def test_saved_and_loaded_experts_give_the_same_logits(
    quantized: QuantizedModel, tmp_path: Path
) -> None:
    save_artifact(quantized, tmp_path)
    ids = torch.stack(token_rows([11, 11]))
    loaded = load_artifact(tmp_path)
    assert loaded.linears.keys() == quantized.linears.keys()
    assert torch.equal(
        build_reference(loaded)(input_ids=ids).logits,
        build_reference(quantized)(input_ids=ids).logits,
    )


def with_values_of(fused: FusedModel, quantized: QuantizedModel) -> Any:
    """The float model, holding the weights that the artifact stands for."""
    state = dict(fused.state)
    for name, linear in quantized.linears.items():
        parameter, _, expert = name.rpartition(".")
        if parameter in state:
            state[parameter] = state[parameter].clone()
            state[parameter][int(expert)] = linear.values()
        else:
            state[f"{name}.weight"] = linear.values()
    return materialize(replace(fused, state=state))


@pytest.mark.parametrize(
    "overrides", [{}, {"*.experts.gate_up_proj": "float"}, {"*.experts.down_proj": "float"}]
)
def test_weight_only_the_reference_is_the_float_model_of_its_weights(
    fused: FusedModel, overrides: dict[str, str], tmp_path: Path
) -> None:
    quantized = quantized_with(fused, "int8-weight-only", overrides=overrides)
    ids = torch.stack(token_rows([11, 11]))
    expected = with_values_of(fused, quantized)(input_ids=ids).logits
    reference = build_reference(quantized)
    assert relative_l2(reference(input_ids=ids).logits, expected) <= WEIGHT_ONLY
    # Int8 weights cost about 1 %; an R4 that is lost or applied twice costs everything. In the
    # median over tokens, because rounding sends one to another expert now and then.
    exact = materialize(fused)(input_ids=ids).logits
    assert float(((expected - exact).norm(dim=-1) / exact.norm(dim=-1)).median()) < 0.05
    distance = relative_l2(split_logits(reference)(ids), expected)
    assert 0 < distance <= WEIGHT_ONLY
    save_artifact(quantized, tmp_path)
    loaded = build_reference(load_artifact(tmp_path))
    # float weights are memory-mapped now, and products of tensors aligned otherwise are summed
    # otherwise
    assert relative_l2(loaded(input_ids=ids).logits, reference(input_ids=ids).logits) <= SAME_SUMS


def test_a_parameter_is_float_by_its_own_name() -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["mixtral"]()))
    parameter = "model.layers.1.mlp.experts.down_proj"
    quantized = quantized_with(fused, overrides={parameter: "float"})
    assert quantized.kept[parameter] == KEPT_BY_OVERRIDE
    assert torch.equal(quantized.floats[parameter], fused.state[parameter])
    assert not any(name.startswith(parameter) for name in quantized.linears)
    assert "model.layers.0.mlp.experts.down_proj.0" in quantized.linears


def test_experts_may_differ_in_scheme_but_not_be_float_alone() -> None:
    config = CONFIGS["mixtral"]()
    wiring, scheme = wiring_for(config), scheme_named("int8")
    found = resolve(scheme, wiring, overrides={"*.experts.down_proj.3": "int4-weight-only"})
    assert (
        found.linears["model.layers.0.mlp.experts.down_proj.3"]
        == scheme_named("int4-weight-only").linear
    )
    assert found.linears["model.layers.0.mlp.experts.down_proj.2"] == scheme.linear
    with pytest.raises(
        QuantizationError, match=r"some experts of 'model\.layers\.0\.mlp\.experts\.down_proj'"
    ) as error:
        resolve(scheme, wiring, overrides={"*.experts.down_proj.3": "float"})
    assert "model.layers.0.mlp.experts.down_proj=float" in str(error.value.hint)


def test_blocks_that_do_not_divide_name_the_parameter_once() -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["mixtral"]()))
    with pytest.raises(
        QuantizationError, match="blocks of 16 do not divide the 88 input features"
    ) as error:
        quantize_fused(fused, "nvfp4")
    assert error.value.message.count("experts.down_proj") == 2  # one for each layer
    assert "down_proj.0" not in error.value.message


STARVED = 2


@pytest.fixture(scope="module")
def starved() -> FusedModel:
    """Of five experts, scored v x, -v x, 0, 2 v x and -2 v x, the third is never among the best
    two.
    """
    config = transformers.Qwen3MoeConfig(**SIZES, **MOE | {"num_experts": 5}, mlp_only_layers=[0])
    tiny: Tiny = make_tiny(config)
    gate = tiny.state["model.layers.1.mlp.gate.weight"]
    gate.copy_(torch.tensor([1.0, -1.0, 0.0, 2.0, -2.0])[:, None] * gate[0].clone())
    return fuse_tiny(tiny, ["r4"])


def observed_tokens(fused: FusedModel) -> dict[int, int]:
    """Tokens of each expert that saw any, of a model with one layer of them."""
    inputs = routed_inputs(fused)
    return {
        int(name.rpartition(".")[2]): len(seen)
        for name, seen in inputs.items()
        if "gate_up" in name
    }


@pytest.mark.parametrize(("scheme", "weights"), [("int8", "rtn"), ("int4-weight-only", "gptq")])
def test_an_expert_that_no_token_reached_is_named_with_its_count(
    starved: FusedModel, scheme: str, weights: str
) -> None:
    with pytest.raises(QuantizationError) as error:
        quantized_with(starved, scheme, weights=weights)
    found, _, others = error.value.message.partition(". The fewest that others saw: ")
    path = "model.layers.1.mlp.experts"
    assert found == f"calibration sent 0 tokens to 1 of 5 experts: {STARVED} of {path}"
    counts = dict(part.split(": ") for part in others.split("; "))
    tokens = observed_tokens(starved)
    assert {name: int(count) for name, count in counts.items()} == {
        f"expert {expert} of {path}": tokens[expert]
        for expert in sorted(tokens, key=lambda e: (tokens[e], e))[:3]
    }
    assert "--override '*.experts.*=int8-weight-only' --weight-algorithm rtn" in str(
        error.value.hint
    )


def test_what_needs_no_token_is_quantized_without_one(starved: FusedModel) -> None:
    name = f"model.layers.1.mlp.experts.down_proj.{STARVED}"
    hinted = quantized_with(starved, overrides={"*.experts.*": "int8-weight-only"})
    assert hinted.linears[name].input_scheme is None
    scheme = customised(scheme_named("int8"), activation_granularity="token")
    how = resolve(scheme, starved.wiring)
    dynamic = quantize_model(starved, how, None, PROVENANCE).linears[name]
    assert dynamic.input_scheme is not None
    assert dynamic.input_scale is None


def test_gptq_rounds_every_expert_for_its_own_tokens() -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["mixtral"]()), ["r1", "r2"])
    moments = observed(fused, "int4-weight-only", weights="gptq").moments
    gptq, rtn = (
        quantized_with(fused, "int4-weight-only", weights=weights) for weights in ("gptq", "rtn")
    )
    for name in expert_names(fused):
        parameter, _, expert = name.rpartition(".")
        weight = fused.state[parameter][int(expert)]
        errors = [
            float(row_errors(weight, found.linears[name].values(), moments[name].float()).sum())
            for found in (gptq, rtn)
        ]
        # with fewer tokens than columns, errors can be moved where no token looks
        assert errors[0] < errors[1] / 2, name


def test_other_observers_and_zero_points_see_the_tokens_of_the_expert() -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["mixtral"]()), ["r4"])
    inputs = routed_inputs(fused)
    scheme = customised(scheme_named("int8"), activation_symmetric=False)
    how = resolve(scheme, fused.wiring)
    quantized = quantize_model(fused, how, loop(), PROVENANCE)
    for name, tokens in inputs.items():
        linear, x = quantized.linears[name], torch.stack(tokens)
        assert linear.input_scale is not None
        width = float(x.max().clamp(min=0) - x.min().clamp(max=0))
        assert float(linear.input_scale) == pytest.approx(width / 255, rel=1e-5), name
        assert linear.input_zero_point is not None
