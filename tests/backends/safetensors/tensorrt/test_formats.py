"""The formats that the interpreter computes with: on values known from their specifications,
against what rotq computes with, and without a line of it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from backends.safetensors.tensorrt.packing import pack
from calib.arithmetic.inputs import fake_quantize_input
from calib.arithmetic.rounding import encode, round_to_format
from calib.schemes import FLOAT4, FLOAT8, INT4, INT8, PerBlock, TensorScheme
from tests.backends.safetensors.tensorrt.formats import (
    E2M1,
    E4M3,
    quantized_blocks,
    rounded,
    unpacked,
)

BACKENDS = Path(__file__).parents[2]
NAMES = {"INT8": INT8, "FP8": FLOAT8, "INT4": INT4, "FP4": FLOAT4}
"""Of TensorRT, and of rotq."""


def test_the_tables_are_those_of_the_specifications() -> None:
    assert E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (len(E4M3), E4M3[1], E4M3[8], E4M3[-1]) == (127, 2.0**-9, 2.0**-6, 448)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("INT8", [0.5, 1.5, -2.5, 200, -200], [0, 2, -2, 127, -128]),
        ("INT4", [7.4, 8, -8.5], [7, 7, -8]),
        ("FP4", [0.25, 0.75, 1.25, -2.5, 5, 9], [0, 1, 1, -2, 4, 6]),
        ("FP8", [17, 19, 1000, 2.0**-10, -(2.0**-8)], [16, 20, 448, 0, -(2.0**-8)]),
    ],
)
def test_ties_go_to_even_and_ends_saturate(
    dtype: str, values: list[float], expected: list[float]
) -> None:
    assert rounded(torch.tensor(values), dtype).tolist() == expected


@pytest.mark.parametrize("dtype", NAMES)
def test_rotq_rounds_to_the_same_numbers(dtype: str) -> None:
    x = 200 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x / 50, x / 5_000])
    assert torch.equal(rounded(x, dtype), round_to_format(x, NAMES[dtype]))


@pytest.mark.parametrize("dtype", ["INT4", "FP4"])
def test_packed_values_are_read_back(dtype: str) -> None:
    values = rounded(4 * torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), dtype)
    packed = pack(encode(values, NAMES[dtype]))
    assert torch.equal(unpacked(packed, (3, 5), dtype), values)


@pytest.mark.parametrize(("dtype", "size"), [("FP8", 32), ("FP4", 16)])
def test_rotq_computes_the_same_blocks(dtype: str, size: int) -> None:
    """But for a scale or a value in ten thousand, which lies on a boundary up to float32."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).exp()
    second = None if dtype == "FP8" else x.abs().max() / (6 * 448)
    values, scale = quantized_blocks(x, dtype, size, second)
    steps = scale.repeat_interleave(size, dim=1) * (1 if second is None else second)
    scheme = TensorScheme(
        NAMES[dtype],
        PerBlock(size),
        dynamic=True,
        scale_format="e8m0" if second is None else "e4m3",
    )
    expected = fake_quantize_input(x, scheme, second)
    close = ((values * steps - expected).abs() <= 1e-6 * expected.abs()).float().mean()
    assert close > 0.9999


@pytest.mark.parametrize(
    "path",
    [*BACKENDS.rglob("interpreter.py"), *BACKENDS.rglob("formats.py")],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_what_checks_imports_no_arithmetic_that_it_checks(path: Path) -> None:
    imported = {
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None
    }
    checked = ("calib.arithmetic", "calib.schemes", "calib.measure", ".packing")
    assert not [name for name in imported if any(part in name for part in checked)]
