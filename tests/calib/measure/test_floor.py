"""The floors of the end-to-end parity bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from calib.artifact import cast_model
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.measure.floor import (
    UNFLIPPED,
    Difference,
    _nearest_tie,
    naive_floor,
    one_flip_floor,
    settled,
    split_sum_floor,
)
from calib.measure.perplexity import model_logits
from calib.measure.reference import ReferenceLinear, build_reference
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.schemes import FLOAT4, INT8, scheme_named
from tests.tiny import (
    CONFIGS,
    PROVENANCE,
    fuse_tiny,
    make_tiny,
    quantize_tiny,
    relative_l2,
    token_rows,
    wide_llama,
)
from tests.tolerances import LINEAR


def test_a_difference_is_that_of_the_whole_stream() -> None:
    torch.manual_seed(0)
    values, reference = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    found = Difference()
    for one, other in zip(values, reference, strict=True):
        found.add(one, other)
    expected = float((values - reference).double().norm() / reference.double().norm())
    assert found.value == pytest.approx(expected, rel=1e-6)  # float32 against float64 sums
    assert Difference().value == 0


@pytest.mark.parametrize("name", ["llama", "llama-bias-tied-headdim"])
def test_one_flip_moves_one_value_by_one_step_and_shows_in_the_logits(name: str) -> None:
    quantized = quantize_tiny(CONFIGS[name](), "int8", ["r1", "r2", "r4"])
    reference = build_reference(quantized)
    row = token_rows([24])[0]
    before = _quantized_inputs(reference, row)
    floor = one_flip_floor(reference, [row])
    assert 0 < floor < 0.1
    after = _quantized_inputs(reference, row)
    assert all(torch.equal(after[name], before[name]) for name in before)  # the hooks are gone
    # Other rows, other flips: the floor over two rows lies between those of each.
    other = token_rows([24], seed=2)[0]
    alone = sorted([floor, one_flip_floor(reference, [other])])
    assert alone[0] <= one_flip_floor(reference, [row, other]) <= alone[1]


@pytest.mark.parametrize("scheme", ["int8-dynamic", "float8", "float8-dynamic", "nvfp4", "mxfp8"])
def test_whatever_is_rounded_has_a_nearest_boundary(scheme: str) -> None:
    reference = build_reference(quantize_tiny(wide_llama(), scheme))
    assert 0 < one_flip_floor(reference, [token_rows([24])[0]]) < 0.2


@pytest.mark.parametrize("kv", ["int8", "float8"])
def test_a_cache_alone_has_a_nearest_boundary_too(kv: str) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()))
    how = resolve(scheme_named("int8-weight-only"), fused.wiring, kv=kv)
    loop = forward_loop_over(length_batches(token_rows(), 4))
    reference = build_reference(quantize_model(fused, how, loop, PROVENANCE))
    row = token_rows([24])[0]
    before = model_logits(reference)(row.unsqueeze(0))
    assert 0 < one_flip_floor(reference, [row]) < 0.1
    assert torch.equal(model_logits(reference)(row.unsqueeze(0)), before)  # the watchers are gone


def test_the_nearest_value_is_put_on_the_other_side_of_its_boundary() -> None:
    scale = torch.tensor(0.5)
    # ratios 0.2, 1.52, 7.2, saturated
    tie = _nearest_tie(torch.tensor([[0.1, 0.76, 3.6, -500.0]]), scale, None, INT8)
    assert (tie.index, tie.other) == (1, 0.5)
    assert tie.distance == pytest.approx(0.02, abs=1e-6)  # float32
    # 4 and 6 surround 4.6
    tie = _nearest_tie(torch.tensor([4.6, 1.0, 7.5]), torch.tensor(1.0), None, FLOAT4)
    assert (tie.index, tie.other) == (0, 6.0)
    assert tie.distance == pytest.approx(0.2, abs=1e-6)


def test_a_zero_point_moves_the_ends_but_no_boundary() -> None:
    scale, zero = torch.tensor(0.5), torch.tensor(100.0)
    # x / s + z: 140.5 lies beyond 127, where nothing flips; -100.4 would be out of reach without z
    tie = _nearest_tie(torch.tensor([20.25, -100.2, -30.1]), scale, zero, INT8)
    assert (tie.index, tie.other) == (1, -100.5)
    assert tie.distance == pytest.approx(0.1, abs=1e-4)  # float32 at 200


def test_values_behind_a_zero_point_flip_too() -> None:
    """With static scales and zero points, the range of x / s alone says nothing of what is
    clamped.
    """
    linear = build_reference(quantize_tiny(CONFIGS["llama"](), "int8")).get_submodule(
        "model.layers.0.self_attn.q_proj"
    )
    assert isinstance(linear, ReferenceLinear)
    scale, width = torch.tensor(0.01), linear.source.weight.shape[1]
    linear.source = replace(
        linear.source, input_scale=scale, input_zero_point=torch.tensor(-128, dtype=torch.int8)
    )
    tied = torch.full((1, 1, width), 200.3 * 0.01)
    tied[0, 0, 5] = (200.5 - 1e-6) * scale
    above = tied.clone()
    above[0, 0, 5] = 200.6 * scale
    expected, flips = settled(linear, tied, linear.matmul(linear.quantize(above)))
    assert flips == 1
    assert relative_l2(expected, linear.matmul(linear.quantize(above))) < LINEAR


def test_an_input_on_a_boundary_may_be_rounded_to_either_side_and_no_other_may() -> None:
    linear = build_reference(quantize_tiny(CONFIGS["llama"](), "int8")).get_submodule(
        "model.layers.0.self_attn.q_proj"
    )
    assert isinstance(linear, ReferenceLinear)
    assert linear.source.input_scale is not None
    scale, width = linear.source.input_scale, linear.source.weight.shape[1]
    x = ((torch.arange(2 * width) % 50 + 0.3) * scale).reshape(1, 2, width)
    tied, above = x.clone(), x.clone()
    tied[0, 1, 7] = (3.5 - 1e-6) * scale
    above[0, 1, 7] = 3.6 * scale
    plain, flipped = (linear.matmul(linear.quantize(each)) for each in (tied, above))
    assert relative_l2(flipped, plain) > 1e-4
    assert settled(linear, tied, plain)[1] == 0
    expected, flips = settled(linear, tied, flipped)
    assert flips == 1
    assert relative_l2(expected, flipped) < LINEAR
    # no flip explains a wrong scale
    assert torch.equal(settled(linear, tied, 1.01 * plain)[0][0, 0], plain[0, 0])
    apart = tied.clone()
    apart[0, 1, 7] = 3.499 * scale
    expected, flips = settled(linear, apart, flipped)
    assert flips == 0
    assert relative_l2(expected, flipped) > 1e-4


def test_the_naive_floor_is_of_the_order_of_its_dtype() -> None:
    quantized = cast_model(quantize_tiny(CONFIGS["llama"](), "int8-weight-only"), torch.float16)
    rows = token_rows([24, 20])
    floor = naive_floor(quantized, build_reference(quantized), rows)
    eps = torch.finfo(torch.float16).eps
    assert eps / 10 < floor < 20 * eps  # two layers of rounding
    last = naive_floor(quantized, build_reference(quantized), rows, last=True)
    assert 0 < last != floor


def test_where_nothing_is_rounded_nothing_flips() -> None:
    quantized = quantize_tiny(CONFIGS["llama"](), "int8-weight-only")
    reference = build_reference(quantized)
    rows = token_rows([24, 20])
    assert one_flip_floor(reference, rows) == 0
    # Two orders of float32 summation over a few layers: some 1e-7 a matmul, and nothing that
    # amplifies it.
    floor = split_sum_floor(reference, rows)
    assert 0 < floor.value < UNFLIPPED
    assert floor.flipped == 0
    assert not floor.representative


def _quantized_inputs(reference: nn.Module, row: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the integer kernels of a plain run see."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in reference.named_modules():
        if isinstance(module, ReferenceLinear):

            def look(linear: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                seen[name] = linear.quantize(args[0])

            handles.append(module.register_forward_pre_hook(look))
    model_logits(reference)(row.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return seen
