"""Keys, packing and the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backends.safetensors.read import open_bundle, read_cache, read_model
from backends.safetensors.tensorrt.layout import TensorRTLayout
from backends.safetensors.tensorrt.packing import pack, packed_size, unpack
from calib.arithmetic.grids import quantize, weight_grid
from calib.artifact import QuantizedLinear
from calib.schemes import LINEAR_SCHEMES, scheme_named
from tests.backends.safetensors.tensorrt.bundles import quantized, with_cache, write


def test_the_first_value_is_in_the_low_nibble() -> None:
    assert pack(torch.tensor([[1, -1, 7], [-8, 3, 0]], dtype=torch.int8)).tolist() == [
        0xF1,
        0x87,
        0x03,
    ]
    assert pack(torch.tensor([5, 15, 9], dtype=torch.uint8)).tolist() == [0xF5, 0x09]


@pytest.mark.parametrize("shape", [(16,), (3, 5), (2, 8), (1,)])
@pytest.mark.parametrize("signed", [True, False])
def test_packing_reads_back(shape: tuple[int, ...], signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, shape, generator=generator).to(torch.int8)
    codes = codes if signed else (codes + 8).to(torch.uint8)
    assert pack(codes).shape == (packed_size(codes.numel()),)
    assert torch.equal(unpack(pack(codes), shape, signed=signed), codes)
    with pytest.raises(ValueError, match="four-bit"):
        unpack(pack(codes), (*shape, 3), signed=signed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", "int8"),
        ("gpt2", "int8-weight-only"),
        ("qwen2", "int4-weight-only"),
        ("gpt2", "w4a8"),
        ("llama", "float8"),
        ("wide", "nvfp4"),
        ("wide", "mxfp8"),
        ("mixtral", "int8"),
    ],
)
def test_a_bundle_reads_back_to_the_last_bit(
    family: str, scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = quantized(family, scheme, dtype=dtype)
    back = read_model(open_bundle(write(model, tmp_path / "b"), verify=True), TensorRTLayout())
    assert back.linears.keys() == model.linears.keys()
    for name, linear in model.linears.items():
        assert_same(linear.tensors(), back.linears[name].tensors())
    assert_same(model.floats, back.floats)


def assert_same(expected: object, found: object) -> None:
    assert isinstance(expected, dict)
    assert isinstance(found, dict)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].float(), tensor.float()), key


def test_keys_shapes_and_dtypes(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    expected = {
        "int8": {
            "weight": ("int8", [64, 96]),
            "weight_scale": ("float16", [96]),
            "input_scale": ("float16", []),
        },
        "int4-weight-only": {"weight": ("uint8", [3072]), "weight_scale": ("float16", [1, 96])},
        "float8": {
            "weight": ("float8_e4m3fn", [64, 96]),
            "weight_scale": ("float16", []),
            "input_scale": ("float16", []),
        },
        "nvfp4": {
            "weight": ("uint8", [3072]),
            "weight_scale": ("float8_e4m3fn", [4, 96]),
            "weight_scale_2": ("float32", []),
            "input_scale": ("float32", []),
        },
        "mxfp8": {
            "weight": ("float8_e4m3fn", [64, 96]),
            "weight_scale": ("float8_e8m0fnu", [2, 96]),
        },
    }
    for scheme, forms in expected.items():
        folder = write(quantized("wide", scheme, (), torch.float16), tmp_path / scheme)
        tensors = open_bundle(folder).manifest.tensors
        found = {
            key.removeprefix(f"{name}."): (entry.dtype, entry.shape)
            for key, entry in tensors.items()
            if key.startswith(f"{name}.")
        }
        assert found == forms, scheme
        assert tensors["lm_head.weight"].shape == [96, 97]
        assert tensors["model.embed_tokens.weight"].shape == [97, 96]


def test_an_embedding_is_not_transposed(tmp_path: Path) -> None:
    model = quantized("wide", "int8", ())
    name, table = "model.embed_tokens", model.floats["model.embed_tokens.weight"]
    floats = {key: tensor for key, tensor in model.floats.items() if key != f"{name}.weight"}
    for preset in ("int8-weight-only", "int4-weight-only"):
        scheme = LINEAR_SCHEMES[preset].weight
        grid = weight_grid(table, scheme)
        embedding = QuantizedLinear(
            name, quantize(table, grid, scheme), grid.scale, scheme, None, None, None, None
        )
        changed = replace(model, linears={name: embedding, **model.linears}, floats=floats)
        bundle = open_bundle(write(changed, tmp_path / preset))
        assert bundle.manifest.tensors[f"{name}.weight_scale"].shape[0] == 97
        assert_same(
            embedding.tensors(), read_model(bundle, TensorRTLayout()).linears[name].tensors()
        )


def test_a_cache_and_act_order_read_back(tmp_path: Path) -> None:
    model = with_cache(quantized("wide", "int4-weight-only", ("r3",)))
    name = "model.layers.0.self_attn.q_proj"
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    changed = replace(
        model, linears={**model.linears, name: replace(model.linears[name], weight_order=order)}
    )
    bundle = open_bundle(write(changed, tmp_path / "b"))
    cache = read_cache(bundle, TensorRTLayout())
    assert cache == changed.cache
    assert "model.layers.1.self_attn.k_scale" in bundle.tensors
    assert "model.layers.1.self_attn.rotation.signs" in bundle.tensors
    back = read_model(bundle, TensorRTLayout())
    assert back.floats.keys() == model.floats.keys()
    assert torch.equal(back.linears[name].values(), changed.linears[name].values())


def test_a_model_that_is_not_quantized_has_a_bundle(tmp_path: Path) -> None:
    model = quantized("llama", "int8", ())
    floats = {f"{name}.weight": linear.values() for name, linear in model.linears.items()}
    plain = replace(
        model, scheme=scheme_named("float"), linears={}, floats={**model.floats, **floats}
    )
    back = read_model(open_bundle(write(plain, tmp_path / "b")), TensorRTLayout())
    assert not back.linears
    assert_same(plain.floats, back.floats)
