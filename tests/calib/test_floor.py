"""The floors of the end-to-end parity bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from calib.floor import UNFLIPPED, Difference, one_flip_floor, split_sum_floor
from calib.perplexity import model_logits
from calib.reference import ReferenceLinear, build_reference
from tests.tiny import CONFIGS, quantize_tiny, token_rows


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


def test_where_nothing_is_rounded_nothing_flips() -> None:
    quantized = quantize_tiny(CONFIGS["llama"](), "int8-weight-only")
    reference = build_reference(quantized)
    rows = token_rows([24, 20])
    assert one_flip_floor(reference, rows) == 0
    # Two orders of float32 summation over a few layers: some 1e-7 a matmul, and nothing that amplifies it.
    floor = split_sum_floor(quantized, reference, rows)
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
