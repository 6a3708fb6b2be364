"""Packs of linears that read one value: which there are, and that nothing of a linear changes in one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from backends.onnx.packing import members, packed, packs, unpacked
from calib.artifact import LINEAR_PARTS, QuantizedLinear
from calib.grids import quantize, weight_grid
from calib.schemes import INT4, LINEAR_SCHEMES, PerBlock, PerTensor, TensorScheme
from tests.backends.onnx.conftest import Exported

WIDTH = 40
ROWS = {"q": 12, "k": 4, "v": 4}


def linear(name: str, scheme: str = "int8", weight: TensorScheme | None = None, **changes: Any) -> QuantizedLinear:
    """A random linear that reads 40 features, with a bias; its input scale is the same for all."""
    form, inputs = weight or LINEAR_SCHEMES[scheme].weight, LINEAR_SCHEMES[scheme].input
    values = torch.randn(ROWS[name], WIDTH, generator=torch.Generator().manual_seed(ord(name)))
    grid = weight_grid(values, form)
    made = QuantizedLinear(
        name=name,
        weight=quantize(values, grid, form),
        weight_scale=grid.scale,
        weight_scheme=form,
        bias=values[:, 0].clone(),
        input_scheme=inputs,
        input_scale=None if inputs is None or inputs.dynamic else torch.tensor(0.25),
        online_rotation=None,
        weight_zero_point=grid.zero_point,
        weight_second_scale=grid.second_level,
    )
    return replace(made, **changes)


FORMS = {
    "per channel": None,
    "blocks of 16": TensorScheme(INT4, PerBlock(16)),
    "blocks with zero points": TensorScheme(INT4, PerBlock(16), symmetric=False),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_what_is_packed_is_unpacked_to_the_last_bit(form: TensorScheme | None) -> None:
    linears = [linear(name, weight=form) for name in ROWS]
    assert packs(linears) == [linears]
    pack = packed(linears)
    assert members(pack.name) == list(ROWS)
    assert pack.weight.shape == (20, WIDTH)
    whole = replace(pack, weight=torch.cat([part.weight for part in linears]))
    for before, after in zip(linears, unpacked(whole, list(ROWS.values())), strict=True):
        assert after.name == before.name
        for part in LINEAR_PARTS:
            old, new = getattr(before, part), getattr(after, part)
            assert (old is None and new is None) or torch.equal(old, new)
    values = whole.values()
    assert torch.equal(values, torch.cat([part.values() for part in linears]))


APART: dict[str, dict[str, Any]] = {
    "another scale of the input": {"input_scale": torch.tensor(0.5)},
    "no bias": {"bias": None},
    "an order of its own": {"weight_order": torch.arange(WIDTH).flip(0)},
    "behind a rotation": {"online_rotation": "R4.0"},
}


@pytest.mark.parametrize("changes", APART.values(), ids=list(APART))
def test_linears_with_other_inputs_stay_apart(changes: dict[str, Any]) -> None:
    q, k, v = linear("q"), linear("k", **changes), linear("v")
    assert packs([q, k, v]) == [[q, v], [k]]


@pytest.mark.parametrize("scheme", ["int8-weight-only", "int4-weight-only"])
def test_linears_of_other_schemes_stay_apart(scheme: str) -> None:
    q, k, v = linear("q"), linear("k", scheme), linear("v")
    assert packs([q, k, v]) == [[q, v], [k]]


def test_one_scale_for_a_weight_is_no_row_of_scales() -> None:
    form = replace(LINEAR_SCHEMES["int8"].weight, granularity=PerTensor())
    linears = [linear(name, weight=form) for name in ROWS]
    assert packs(linears) == [[each] for each in linears]


def test_a_packed_graph_has_one_matmul_for_query_key_and_value(llama: Exported) -> None:
    """What it computes, what is read back from it and what its probes show is tested with every other graph."""
    products = [node.name for node in llama.graph.node if node.op_type == "MatMul" and "_proj" in node.name]
    layer = "model.layers.0."
    expected = [
        "|".join(f"{layer}self_attn.{part}_proj" for part in "qkv"),
        f"{layer}self_attn.o_proj",
        "|".join(f"{layer}mlp.{part}_proj" for part in ("gate", "up")),
        f"{layer}mlp.down_proj",
    ]
    assert [name for name in products if name.startswith(layer)] == [f"{name}/MatMul" for name in expected]
