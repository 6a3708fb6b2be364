"""The packing is that of the compressed-tensors library, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends.safetensors.compressed_tensors.packing import (
    pack_integers,
    pack_nibbles,
    unpack_integers,
    unpack_nibbles,
)
from backends.safetensors.compressed_tensors.schemes import form_of
from calib.arithmetic.grids import dequantize
from calib.artifact import QuantizedLinear
from tests.backends.safetensors.compressed_tensors.compressed_support import (
    artifact,
    equal,
    tensors_of,
)

library: Any = pytest.importorskip(
    "compressed_tensors.compressors", reason="compressed-tensors is not installed"
)
compressors: Any = library.BaseCompressor


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 33, 96])
def test_words_are_those_of_the_library(bits: int, columns: int) -> None:
    reach = 1 << (bits - 1)
    values = torch.randint(
        -reach, reach, (5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(bits)
    )
    values[0, 0], values[-1, -1] = -reach, reach - 1
    words = pack_integers(values, bits)
    expected = library.pack_to_int32(values, bits)
    assert words.dtype == expected.dtype
    assert torch.equal(words, expected)
    assert torch.equal(unpack_integers(words, bits, columns), values)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_transposed_column_packs(bits: int) -> None:
    column = torch.arange(-8, 8, dtype=torch.int8)[:, None]
    assert torch.equal(
        pack_integers(column.T, bits).T, library.pack_to_int32(column, bits, packed_dim=0)
    )


def test_nibbles_are_those_of_the_library() -> None:
    codes = torch.randint(
        0, 16, (6, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    codes[0, :16] = torch.arange(16)  # all of them, -0 too
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([magnitudes, -magnitudes])[codes.int()]
    packed = pack_nibbles(codes)
    assert torch.equal(packed, library.pack_fp4_to_uint8(values))
    assert torch.equal(unpack_nibbles(packed), codes)


_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "int8-zero-points": ("int8", {"weight_symmetric": False}),
    "int8-weight-only-zero-points": ("int8-weight-only", {"weight_symmetric": False}),
    "int4-blocks": ("int4-weight-only", {"block_size": 8}),
    "int4-blocks-zero-points": ("int4-weight-only", {"block_size": 8, "weight_symmetric": False}),
    "int4-whole-rows-zero-points": ("int4-weight-only", {"weight_symmetric": False}),
    "w4a4": ("w4a4", {}),
    "float8": ("float8", {}),
    "float8-dynamic": ("float8-dynamic", {}),
    "nvfp4": ("nvfp4", {}),
    "mxfp4": ("mxfp4", {}),
    "mxfp8": ("mxfp8", {}),
}


@pytest.mark.parametrize("case", _CASES)
def test_a_compressor_of_the_library_makes_the_same_tensors_of_the_float_weight(case: str) -> None:
    """The whole of a linear: the library is given ``(q - z) s`` and the scale, and has to find q
    again and pack it.
    """
    scheme, controls = _CASES[case]
    model = artifact("wide", scheme, **controls)
    tensors = tensors_of(model)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        linear = model.linears[name]
        stored = {
            key.removeprefix(f"{name}."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        form = form_of(linear)
        compressor = compressors.get_value_from_registry(form.compression)
        made = compressor.compress(_local(linear, stored), form.group(["Linear"]))
        assert made.keys() == stored.keys()
        for part, value in stored.items():
            expected = made[part]
            # the library's rounding loses -0
            if part == "weight_packed" and linear.weight.dtype == torch.uint8:
                value, expected = _unsigned_zero(value), _unsigned_zero(expected)
            assert equal(expected, value), part


def _local(linear: QuantizedLinear, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the library starts from: the float weight and its scales, before they are packed."""
    scale = linear.weight_scale
    found = stored | {"weight": dequantize(linear.weight, linear.grid, linear.weight_scheme)}
    found["weight_scale"] = scale.reshape(stored["weight_scale"].shape)
    if linear.weight_zero_point is not None:
        found["weight_zero_point"] = linear.weight_zero_point.to(torch.int8).reshape(
            scale.shape[0], -1
        )
    for packed in ("weight_packed", "weight_shape"):
        found.pop(packed, None)
    return found


def _unsigned_zero(packed: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 codes with -0 turned into 0."""
    codes = unpack_nibbles(packed)
    return pack_nibbles(torch.where(codes == 8, 0, codes))
