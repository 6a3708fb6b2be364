"""Calibration through ModelOpt: what it quantizes, and that its amax is the plain abs-max of what a
model computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.arithmetic.grids import weight_grid
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.errors import CheckpointError, DataError, QuantizationError
from calib.fusing import materialize
from calib.modelopt.config import modelopt_calibrates, modelopt_config
from calib.modelopt.quantize import input_amax, modelopt_quantize, read_input_amax
from calib.schemes import (
    INT8,
    LINEAR_SCHEMES,
    SCHEMES,
    PerCluster,
    PerTensor,
    TensorScheme,
    scheme_named,
)
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, token_rows, wide_llama

WIDE = "llama-wide"
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def model_of(name: str = "llama") -> Any:
    return make_tiny(wide_llama() if name == WIDE else CONFIGS[name]()).model(torch.float32)


def loop(batch_size: int = 4) -> Callable[[nn.Module], None]:
    return forward_loop_over(length_batches(token_rows(), batch_size))


def linear_names(model: Any) -> list[str]:
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name != "lm_head"
    ]


def watched_inputs(model: Any, names: list[str]) -> dict[str, float]:
    """Largest magnitude at each linear over the same rows, one row at a time, by hooks of our
    own.
    """
    found = dict.fromkeys(names, 0.0)

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = max(found[name], float(args[0].abs().max()))

        return look

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for row in token_rows():
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("mode", LINEAR_SCHEMES)
def test_modelopt_runs_every_scheme_and_reads_the_abs_max_of_inputs(mode: str) -> None:
    scheme = scheme_named(mode)
    plain, model = model_of(WIDE), model_of(WIDE)
    names = linear_names(plain)
    quantized = modelopt_quantize(model, mode, forward_loop=None if scheme.weight_only else loop())
    assert quantized is model
    if scheme.activation is None or not modelopt_calibrates(scheme.activation):
        return
    inputs = watched_inputs(plain, names)
    amax = read_input_amax(quantized, names)
    assert list(amax) == names
    for name in names:  # rows were batched in the calibration, which moves a sum by a few eps
        assert float(amax[name]) == pytest.approx(inputs[name], rel=1e-5)


@pytest.mark.parametrize("mode", ["int8", "int4-weight-only", "float8"])
def test_modelopts_weight_scales_are_ours(mode: str) -> None:
    """amax of each group, ``[]``, ``[out, 1]`` or ``[out * blocks, 1]``; 200 features end in a
    block of 72.
    """
    scheme = scheme_named(mode).weight
    model = nn.Sequential(nn.Linear(200, 16, bias=False)).eval()
    weight = model[0].weight.detach().clone()
    modelopt_quantize(
        model, mode, modules=["0"], forward_loop=lambda module: module(torch.ones(1, 200))
    )
    quantizer: Any = model[0].weight_quantizer
    grid = weight_grid(weight, scheme)
    assert torch.equal(
        grid.scale,
        (quantizer.amax.double() / scheme.format.maxbound).float().reshape(grid.scale.shape),
    )


def test_observing_leaves_the_model_as_it_is() -> None:
    model = model_of()
    before = {
        name: (type(part), id(getattr(part, "weight", None)))
        for name, part in model.named_modules()
    }
    names = linear_names(model)
    inputs = dict.fromkeys(names, SCHEMES["int8"].linear.input)
    amax = input_amax(model, inputs, loop())
    assert {
        name: (type(part), id(getattr(part, "weight", None)))
        for name, part in model.named_modules()
    } == before
    watched = watched_inputs(model, names)
    assert all(float(amax[name]) == pytest.approx(watched[name], rel=1e-5) for name in names)


def test_the_batch_size_does_not_change_amax() -> None:
    """No padding enters: a pad token's activation would be the largest here, because its embedding
    is made so.
    """
    found = []
    for batch_size in (1, 4):
        model = model_of()
        with torch.no_grad():
            model.model.embed_tokens.weight[0] = 1e4
        names = linear_names(model)
        modelopt_quantize(model, "int8", forward_loop=loop(batch_size))
        found.append(torch.stack(list(read_input_amax(model, names).values())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0.0)


def test_by_default_the_linears_of_gpt2_are_quantized_too() -> None:
    """GPT-2 has no ``nn.Linear`` but the head: its linears are ``Conv1D``."""
    model = model_of("gpt2")
    modelopt_quantize(model, "int8-weight-only")
    names = [
        f"transformer.h.{i}.{part}"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert enabled_quantizers(model) == {f"{name}.weight_quantizer" for name in names}


def enabled_quantizers(model: nn.Module) -> set[str]:
    return {
        name
        for name, part in model.named_modules()
        if name.endswith("_quantizer") and part.is_enabled
    }


@pytest.mark.parametrize("mode", LINEAR_SCHEMES)
def test_exactly_the_named_modules_are_quantized(mode: str) -> None:
    model = model_of()
    scheme = scheme_named(mode)
    modelopt_quantize(model, mode, forward_loop=loop(), modules=[Q, DOWN])
    kinds = ["weight_quantizer"] if scheme.weight_only else ["weight_quantizer", "input_quantizer"]
    assert enabled_quantizers(model) == {f"{name}.{kind}" for name in (Q, DOWN) for kind in kinds}


def test_a_name_that_ends_another_is_not_taken_for_it() -> None:
    """``blocks.1`` is not ``blocks.11``, and ``proj`` is not ``o_proj``."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("proj", "o_proj", "proj1")})
    outer = nn.ModuleDict({"proj": nn.ModuleDict({"proj": nn.Linear(4, 4)}), "rest": model})
    modelopt_quantize(outer, "int8-weight-only", modules=["rest.proj"])
    assert enabled_quantizers(outer) == {"rest.proj.weight_quantizer"}


def test_the_head_is_left_out_by_default_and_taken_when_named() -> None:
    model = model_of()
    modelopt_quantize(model, "int8-weight-only")
    expected = {f"{name}.weight_quantizer" for name in linear_names(model_of())}
    assert enabled_quantizers(model) == expected
    model = model_of()
    modelopt_quantize(model, "int8-weight-only", modules=["lm_head"])
    assert enabled_quantizers(model) == {"lm_head.weight_quantizer"}


def test_inputs_are_seen_after_the_online_rotation() -> None:
    """R4 changes what the down projection quantizes; the amax must be that of the rotated input."""
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()), ["r4"])
    rotated = materialize(fused)
    modelopt_quantize(rotated, "int8", forward_loop=loop())
    found = float(read_input_amax(rotated, [DOWN])[DOWN])
    before: list[Tensor] = []
    plain = make_tiny(CONFIGS["llama"]()).model(torch.float32)
    plain.get_submodule(DOWN).register_forward_pre_hook(lambda module, args: before.append(args[0]))
    with torch.no_grad():
        for row in token_rows():
            plain(input_ids=row[None])
    rotation = fused.rotations.r4(1)
    assert rotation is not None
    expected = max(float(rotation.apply(x).abs().max()) for x in before)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(max(float(x.abs().max()) for x in before), rel=1e-2)


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_activations_without_a_forward_loop_are_refused(mode: str) -> None:
    with pytest.raises(DataError, match="needs calibration data") as caught:
        modelopt_quantize(nn.Linear(2, 2), mode)
    assert "forward_loop" in str(caught.value.hint)


def test_an_unknown_mode_lists_the_schemes() -> None:
    with pytest.raises(QuantizationError, match="unknown scheme 'int2'"):
        modelopt_quantize(nn.Linear(2, 2), "int2")


def test_a_module_that_does_not_exist_is_named() -> None:
    with pytest.raises(CheckpointError, match="no submodule 'absent'"):
        modelopt_quantize(nn.Sequential(nn.Linear(2, 2)), "int8-weight-only", modules=["absent"])


def test_linears_that_no_row_reaches_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})

    def run(module: Any) -> None:
        module["used"](torch.ones(1, 4))

    with pytest.raises(QuantizationError, match=r"never reached 1 module\(s\): idle") as caught:
        modelopt_quantize(model, "int8", forward_loop=run, modules=["used", "idle"])
    assert "--nsamples" in str(caught.value.hint)


def test_an_input_that_overflows_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].bias.fill_(3e38)
        model[0].weight.fill_(1e38)

    with pytest.raises(QuantizationError, match=r"NaN or Inf in the input of 2\n"):
        modelopt_quantize(
            model, "int8", forward_loop=lambda module: module(torch.full((1, 4), 10.0))
        )


def test_an_input_that_is_always_zero_has_amax_zero() -> None:
    """ModelOpt's own export would say 127 here, a scale of 1, without a word."""
    model = nn.Sequential(nn.Linear(4, 4))
    modelopt_quantize(
        model, "int8", forward_loop=lambda module: module(torch.zeros(1, 4)), modules=["0"]
    )
    assert read_input_amax(model, ["0"])["0"] == torch.zeros(())


def test_a_config_names_every_module_once_and_disables_the_rest() -> None:
    entries = modelopt_config(dict.fromkeys("ab", SCHEMES["int4-weight-only"].weight), {})[
        "quant_cfg"
    ]
    assert entries[0] == {"quantizer_name": "*", "enable": False}
    assert [entry["quantizer_name"] for entry in entries[1:]] == [
        "a.weight_quantizer",
        "b.weight_quantizer",
    ]
    assert entries[1]["cfg"] == {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}


def test_zero_points_are_not_modelopts() -> None:
    scheme = TensorScheme(INT8, PerTensor(), symmetric=False)
    assert not modelopt_calibrates(scheme)
    with pytest.raises(QuantizationError, match="no zero point"):
        modelopt_config({}, {"a": scheme})
    with pytest.raises(QuantizationError, match="no quantizer PerCluster"):
        modelopt_config({}, {"a": TensorScheme(INT8, PerCluster(2))})
