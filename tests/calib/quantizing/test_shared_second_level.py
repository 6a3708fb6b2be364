"""One second level of NVFP4 scales for the weights that runtimes merge into one matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from calib.artifact import QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.fusing import FusedModel
from calib.layerwise.calibrator import quantize_blockwise
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import Quantization, resolve
from calib.schemes import scheme_named
from calib.weights.algorithms import algorithm_named
from tests.tiny import (
    CONFIGS,
    PROVENANCE,
    SIZES,
    fuse_tiny,
    make_tiny,
    relative_l2,
    token_rows,
    wide_llama,
)

_GROUPS = (("self_attn", "q_proj", "k_proj", "v_proj"), ("mlp", "gate_proj", "up_proj"))


def _fused() -> FusedModel:
    return fuse_tiny(make_tiny(wide_llama()))


def _wanted(
    fused: FusedModel, weights: str = "rtn", overrides: dict[str, str] | None = None
) -> Quantization:
    return resolve(
        scheme_named("nvfp4"),
        fused.wiring,
        weights=weights,
        overrides=overrides,
    )


def _quantized(fused: FusedModel, wanted: Quantization) -> QuantizedModel:
    return quantize_model(
        fused, wanted, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
    )


def _level(model: QuantizedModel, name: str) -> float:
    level = model.linears[name].weight_second_scale
    assert level is not None
    return float(level)


@pytest.mark.parametrize(
    "weights", ["rtn", "mse", "gptq", "gptq:act_order=false", "gptq:act_order=false,clip=false"]
)
def test_merged_weights_share_the_level_of_the_largest(weights: str) -> None:
    """The key projection is made larger than the others, whose blocks must then be scaled under its
    level.
    """
    fused = _fused()
    large = "model.layers.0.self_attn.k_proj.weight"
    fused = replace(fused, state={**fused.state, large: fused.state[large] * 8})
    model = _quantized(fused, _wanted(fused, weights))
    for layer in range(2):
        for parent, *names in _GROUPS:
            group = [f"model.layers.{layer}.{parent}.{name}" for name in names]
            largest = max(float(fused.state[f"{name}.weight"].abs().max()) for name in group)
            levels = {_level(model, name) for name in group}
            assert len(levels) == 1
            assert levels.pop() == pytest.approx(largest / (6 * 448), rel=1e-7)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            full = f"model.layers.{layer}.{name}"
            own = float(fused.state[f"{full}.weight"].abs().max())
            assert _level(model, full) == pytest.approx(own / (6 * 448), rel=1e-7)
    for name, linear in model.linears.items():
        # the roundings are at 0.08 to 0.23; codes under one level that are read under another are
        # off by its ratio
        assert relative_l2(linear.values(), fused.state[f"{name}.weight"]) < 0.4, name


def test_the_block_by_block_run_shares_it_as_well(tmp_path: Path) -> None:
    fused = _fused()
    wanted, batches = _wanted(fused), length_batches(token_rows(), 4)
    whole = _quantized(fused, wanted)
    work, folder = tmp_path / "work", tmp_path / "out"
    folder.mkdir()
    blocks = quantize_blockwise(fused, wanted, batches, PROVENANCE, work, folder)
    assert {name: _level(blocks, name) for name in blocks.linears} == {
        name: _level(whole, name) for name in whole.linears
    }


def test_a_weight_left_in_float_counts_for_nothing() -> None:
    fused = _fused()
    name = "model.layers.0.self_attn.v_proj"
    fused = replace(
        fused, state={**fused.state, f"{name}.weight": fused.state[f"{name}.weight"] * 100}
    )
    model = _quantized(fused, _wanted(fused, overrides={name: "float"}))
    query, key = (f"model.layers.0.self_attn.{part}_proj" for part in "qk")
    largest = max(float(fused.state[f"{part}.weight"].abs().max()) for part in (query, key))
    assert (
        _level(model, query) == _level(model, key) == pytest.approx(largest / (6 * 448), rel=1e-7)
    )


def test_experts_have_levels_of_their_own() -> None:
    sizes = SIZES | {"hidden_size": 96, "intermediate_size": 64}
    fused = fuse_tiny(
        make_tiny(transformers.MixtralConfig(**sizes, head_dim=16, num_local_experts=4))
    )
    model = _quantized(fused, _wanted(fused))
    parameter = "model.layers.0.mlp.experts.gate_up_proj"
    for expert in range(4):
        own = float(fused.state[parameter][expert].abs().max())
        assert _level(model, f"{parameter}.{expert}") == pytest.approx(own / (6 * 448), rel=1e-7)


def test_scales_of_one_level_are_untouched_by_it() -> None:
    weight = fuse_tiny(make_tiny(CONFIGS["llama"]())).state[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    scheme = scheme_named("int8").weight
    assert scheme is not None
    plain, given = (
        algorithm_named("rtn").round(weight, None, scheme, amax=amax)
        for amax in (None, torch.tensor(9.0))
    )
    assert torch.equal(plain.grid.scale, given.grid.scale)
