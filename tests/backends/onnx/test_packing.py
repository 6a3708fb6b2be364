"""Packs of linears that read one value: which there are, and that nothing of a linear changes in
one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from backends.onnx.names import members
from backends.onnx.packing import packed, packs, unpacked
from calib.arithmetic.grids import quantize, weight_grid
from calib.artifact import LINEAR_PARTS, QuantizedLinear
from calib.schemes import INT4, LINEAR_SCHEMES, PerBlock, PerTensor, TensorScheme
from tests.backends.onnx.conftest import Exported

WIDTH = 40
ROWS = {"q": 12, "k": 4, "v": 4}


def linear(
    name: str,
    scheme: str = "int8",
    weight: TensorScheme | None = None,
    rows: int | None = None,
    **changes: Any,
) -> QuantizedLinear:
    """A random linear that reads 40 features, with a bias; its input scale is the same for all."""
    form, inputs = weight or LINEAR_SCHEMES[scheme].weight, LINEAR_SCHEMES[scheme].input
    values = torch.randn(
        rows or ROWS[name], WIDTH, generator=torch.Generator().manual_seed(ord(name))
    )
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


SIZES = {
    (WIDTH, WIDTH): False,
    (2 * WIDTH, 2 * WIDTH): False,
    (WIDTH, WIDTH - 1): True,
    (2 * WIDTH, WIDTH // 4): True,
}
"""Outputs of two linears that round their input, and whether they gain by being one."""


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
def test_rounded_inputs_are_packed_for_small_matrices_only(
    scheme: str, sizes: tuple[int, int]
) -> None:
    pair = [linear(name, scheme, rows=rows) for name, rows in zip("qk", sizes, strict=True)]
    assert packs(pair) == ([pair] if SIZES[sizes] else [[each] for each in pair])


@pytest.mark.parametrize("sizes", SIZES)
def test_weight_only_linears_are_packed_whatever_their_sizes(sizes: tuple[int, int]) -> None:
    pair = [
        linear(name, "int8-weight-only", rows=rows) for name, rows in zip("qk", sizes, strict=True)
    ]
    assert packs(pair) == [pair]


GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
GRAPHS = {
    "llama": GATE_UP,
    "block-diagonal": ("|".join(f"model.layers.0.{name}" for name in GATE_UP),),
}
"""The MatMuls of gate and up in a graph with rounded inputs and in a weight-only one, without
``model.layers.0.``.
"""


@pytest.mark.parametrize("name", GRAPHS)
def test_a_packed_graph_has_one_matmul_for_what_is_packed(
    name: str, export_of: Callable[[str], Exported]
) -> None:
    """What it computes, what is read back from it and what its probes show is tested with every
    other graph.
    """
    layer = "model.layers.0."
    products = [
        node.name
        for node in export_of(name).graph.node
        if node.op_type == "MatMul" and "_proj" in node.name
    ]
    expected = [
        "|".join(f"{layer}self_attn.{part}_proj" for part in "qkv"),
        f"{layer}self_attn.o_proj",
        *(f"{layer}{part.removeprefix(layer)}" for part in GRAPHS[name]),
        f"{layer}mlp.down_proj",
    ]
    assert [name for name in products if name.startswith(layer)] == [
        f"{name}/MatMul" for name in expected
    ]
