"""Quantized checkpoints are read as what the libraries that made them make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from calib.errors import CheckpointError
from calib.network.checkpoint import Checkpoint
from calib.network.quantized import Header, quantization_of

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
}


class Held:
    """Tensors in memory, which answer as an open safetensors file does."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> Any:
        tensor = self.tensors[name]

        class Slice:
            def get_shape(self) -> list[int]:
                return list(tensor.shape)

            def get_dtype(self) -> str:
                return DTYPES[tensor.dtype]

        return Slice()


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Checkpoint:
    quantization = quantization_of({"quantization_config": settings})
    assert quantization is not None
    return Checkpoint(dict.fromkeys(tensors, Held(tensors)), quantization=quantization)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 8], "fmt": "e4m3"}


def test_fp8_blocks_are_what_transformers_makes_of_them() -> None:
    weight = random(48, 32).to(torch.float8_e4m3fn)
    scale = random(3, 4, seed=1).abs()
    found = read({NAME: weight, f"{NAME}_scale_inv": scale}, FP8)
    assert list(found) == [NAME]
    assert found.shape(NAME) == (48, 32)
    assert torch.equal(found[NAME], Fp8Dequantize(None)._dequantize_one(weight, scale))
    assert found.stored_bytes(NAME) == 48 * 32 + 3 * 4 * 4


def test_the_last_fp8_blocks_may_be_cut_off() -> None:
    weight = random(40, 30).to(torch.float8_e4m3fn)
    scale = random(3, 4, seed=1).abs()
    rows, columns = np.arange(40) // 16, np.arange(30) // 8
    expected = weight.float() * scale[rows][:, columns]
    assert torch.equal(read({NAME: weight, f"{NAME}_scale_inv": scale}, FP8)[NAME], expected)


def test_a_block_may_be_stated_in_words() -> None:
    """As compressed-tensors takes it; 192 rows are two blocks of 96, too."""
    weight = random(192, 384).to(torch.float8_e4m3fn)
    scale = random(2, 3, seed=1).abs()
    rows, columns = np.arange(192) // 128, np.arange(384) // 128
    expected = weight.float() * scale[rows][:, columns]
    blocks = {"strategy": "block", "block_structure": "128x128"}
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": blocks}},
    }
    assert torch.equal(read({NAME: weight, f"{NAME}_scale": scale}, settings)[NAME], expected)


def test_one_scale_for_a_row_in_each_group_needs_no_stated_size() -> None:
    weight = random(48, 32).to(torch.float8_e4m3fn)
    for grid, rows, columns in (((48, 4), 1, 8), ((3, 32), 16, 1)):
        scale = random(*grid, seed=1).abs()
        expected = weight.float() * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        stored = {NAME: weight, f"{NAME}_scale": scale}
        assert torch.equal(read(stored, {"quant_method": "fp8"})[NAME], expected)


def test_scales_of_one_byte_are_exponents() -> None:
    weight = random(32, 16).to(torch.float8_e4m3fn)
    scale = integers(120, 130, 2, 2).to(torch.uint8)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(read({NAME: weight, f"{NAME}_scale_inv": scale}, FP8)[NAME], expected)


SCHEMES = {
    "int4-group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8}),
    "int4-asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    ),
    "int8-channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int3-group": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 8}),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 8]},
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_is_what_its_library_makes_of_it(name: str) -> None:
    form, settings = SCHEMES[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    grid = {"tensor": (1,), "channel": (32, 1), "block": (2, 8)}.get(
        settings["strategy"], (32, 64 // settings.get("group_size", 1))
    )
    limit = 2.0 ** (settings["num_bits"] - 1)
    state = {
        "weight": random(32, 64),
        "weight_scale": random(*grid, seed=1).abs() / (limit if "type" not in settings else 100.0),
    }
    if settings.get("symmetric") is False:
        state["weight_zero_point"] = integers(-8, 8, *grid).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    compressed = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(compressed), scheme)["weight"]

    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"weights": settings}},
    }
    stored = {f"{MODULE}.{key}": tensor for key, tensor in compressed.items()}
    found = read({**stored, f"{MODULE}.input_scale": torch.ones(1)}, config)
    assert list(found) == [NAME]
    assert found[NAME].dtype is torch.float32
    assert torch.equal(found[NAME], expected)


@pytest.mark.parametrize(("columns", "groups"), [(100, 1), (100, 5), (7, 1)])
def test_the_last_word_of_a_row_may_be_filled_in_part(columns: int, groups: int) -> None:
    settings = {"num_bits": 4, "strategy": "group", "group_size": columns // groups}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    state = {
        "weight": random(8, columns),
        "weight_scale": random(8, groups, seed=1).abs() / 8,
    }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    compressed = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(compressed), scheme)["weight"]
    stored = {f"{MODULE}.{key}": tensor for key, tensor in compressed.items()}
    found = read(stored, CT4)
    assert found.shape(NAME) == (8, columns)
    assert torch.equal(found[NAME], expected)


@pytest.mark.parametrize("said", [[4, 24], [4, 33], [5, 32]])
def test_a_shape_that_the_words_do_not_hold_is_refused(said: list[int]) -> None:
    stored = {
        f"{NAME}_packed": torch.ones(4, 4).int(),
        f"{NAME}_scale": torch.ones(4, 1),
        f"{NAME}_shape": torch.tensor(said),
    }
    with pytest.raises(CheckpointError, match=r"4 rows of 4 words hold 25 to 32 numbers each"):
        read(stored, CT4)


def test_groups_of_compressed_tensors_may_be_in_another_order() -> None:
    codes, order = integers(0, 16, 8, 32), integers(0, 4, 32, seed=1)
    words = codes.reshape(8, 4, 8).numpy().astype(np.uint64)
    packed = (words << (4 * np.arange(8, dtype=np.uint64))).sum(-1).astype(np.uint32)
    scale = random(8, 4, seed=2)
    stored = {
        f"{NAME}_packed": torch.from_numpy(packed.view(np.int32)),
        f"{NAME}_scale": scale,
        f"{NAME}_shape": torch.tensor([8, 32]),
        f"{NAME}_g_idx": order.int(),
    }
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
    }
    assert torch.equal(read(stored, settings)[NAME], (codes - 8) * scale[:, order])


def packed_rows(codes: np.ndarray[Any, Any], bits: int) -> Tensor:
    """Integers ``[n, m]`` packed along the first axis, one bit after the other."""
    stream = (codes.T[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(codes.shape[1], -1, 32).astype(np.uint64)
    words = (stream << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)
    return torch.from_numpy(np.ascontiguousarray(words.T).view(np.int32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("form", "offset"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq(bits: int, form: str, offset: int, ordered: bool) -> None:
    """``w = (q - z) s`` with q and z in the bits that the published layout has them in."""
    codes, zeros = integers(0, 2**bits, 64, 32).numpy(), integers(1, 2**bits, 4, 32, seed=1).numpy()
    scale = random(4, 32, seed=2).half()
    order = integers(0, 4, 64, seed=3) if ordered else torch.arange(64) // 16
    stored = {
        f"{MODULE}.qweight": packed_rows(codes, bits),
        f"{MODULE}.qzeros": packed_rows((zeros - offset).T, bits).mT.contiguous(),
        f"{MODULE}.scales": scale.float(),
    }
    if ordered:
        stored[f"{MODULE}.g_idx"] = order.int()
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": form}
    expected = torch.from_numpy(codes - zeros[order]) * scale.float()[order]
    assert torch.equal(read(stored, settings)[NAME], expected.mT)


def test_awq() -> None:
    """``w = (q - z) s`` with eight outputs in a word, in AutoAWQ's order."""
    codes, zeros = integers(0, 16, 32, 48).numpy(), integers(0, 16, 4, 48, seed=1).numpy()
    scale = random(4, 48, seed=2)

    def pack(values: np.ndarray[Any, Any]) -> Tensor:
        words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
        for half, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words |= values[:, output::8].astype(np.uint32) << np.uint32(4 * half)
        return torch.from_numpy(words.view(np.int32))

    stored = {
        f"{MODULE}.qweight": pack(codes),
        f"{MODULE}.qzeros": pack(zeros),
        f"{MODULE}.scales": scale,
    }
    group = np.arange(32) // 8
    expected = torch.from_numpy(codes - zeros[group]) * scale[group]
    settings = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}
    assert torch.equal(read(stored, settings)[NAME], expected.mT)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = integers(0, 256, 3, 10, 2, 16).to(torch.uint8)
    scales = integers(110, 140, 3, 10, 2, seed=1).to(torch.uint8)
    found = read({f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"})
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert found.shape(name) == tuple(expected.shape) == (3, 64, 10)
    assert torch.equal(found[name], expected)


def test_int4_of_modelopt() -> None:
    """Signed numbers, two outputs in a byte, and what AWQ multiplies inputs by."""
    codes, scale = integers(-8, 8, 6, 32), random(6, 4)
    factors = random(32, seed=1)
    low, high = (codes[start::2] & 15 for start in (0, 1))
    stored = {
        NAME: (low | high << 4).to(torch.uint8),
        f"{NAME}_scale": scale,
        f"{MODULE}.pre_quant_scale": factors,
    }
    settings = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}
    expected = codes * scale.repeat_interleave(8, 1) * factors
    assert torch.equal(read(stored, settings)[NAME], expected)


E4M3 = torch.float8_e4m3fn
CT4 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
}
MALFORMED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "scale-missing": ({NAME: torch.ones(4, 4).to(E4M3)}, FP8, "its scale is missing"),
    "weight-missing": ({f"{NAME}_scale": torch.ones(1)}, FP8, f"{NAME} is missing"),
    "float-with-scale": (
        {NAME: torch.ones(4, 4), f"{NAME}_scale": torch.ones(1)},
        FP8,
        "stored in F32",
    ),
    "blocks": (
        {NAME: torch.ones(48, 32).to(E4M3), f"{NAME}_scale_inv": torch.ones(5, 4)},
        FP8,
        r"scales of shape \[5, 4\] do not fit \[48, 32\] in blocks of 16 x 8",
    ),
    "blocks-of-no-size": (
        {NAME: torch.ones(192, 512).to(E4M3), f"{NAME}_scale": torch.ones(2, 4)},
        {"quant_method": "fp8"},
        r"\[2, 4\] do not fit \[192, 512\] and the config says no size of blocks",
    ),
    "blocks-of-two-sizes": (
        {NAME: torch.ones(192, 512).to(E4M3), f"{NAME}_scale": torch.ones(2, 4)},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                str(rows): {"weights": {"block_structure": [rows, 128]}} for rows in (96, 128)
            },
        },
        "in blocks of 96 x 128 or 128 x 128",
    ),
    "not-a-matrix": (
        {NAME: torch.ones(4).to(E4M3), f"{NAME}_scale": torch.ones(1)},
        FP8,
        "expected a matrix",
    ),
    "packed-without-shape": (
        {f"{NAME}_packed": torch.ones(4, 4).int(), f"{NAME}_scale": torch.ones(4, 1)},
        CT4,
        "weight_shape is missing",
    ),
    "bits": (
        {f"{NAME}_packed": torch.ones(4, 4).int()},
        {"quant_method": "compressed-tensors"},
        "num_bits = None",
    ),
    "gptq-without-scales": (
        {f"{MODULE}.qweight": torch.ones(4, 32).int()},
        {"quant_method": "gptq", "bits": 4},
        r"scales is missing",
    ),
    "gptq-bits": (
        {f"{MODULE}.qweight": torch.ones(4, 32).int()},
        {"quant_method": "gptq", "bits": 5},
        "bits = 5",
    ),
    "awq-zeros": (
        {
            f"{MODULE}.qweight": torch.ones(32, 4).int(),
            f"{MODULE}.scales": torch.ones(4, 32),
            f"{MODULE}.qzeros": torch.ones(2, 4).int(),
        },
        {"quant_method": "awq", "bits": 4},
        r"qzeros has shape \[2, 4\], expected \[4, 4\]",
    ),
    "awq-version": ({}, {"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
    "nothing": ({NAME: torch.ones(4, 4)}, FP8, "no tensor is quantized"),
    "mxfp4-scales": (
        {"e.down_proj_blocks": torch.ones(2, 4, 1, 16).to(torch.uint8)},
        {"quant_method": "mxfp4"},
        "down_proj_scales is missing",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_weights_are_refused_in_one_line_from_headers_alone(name: str) -> None:
    tensors, settings, reason = MALFORMED[name]
    quantization = quantization_of({"quantization_config": settings})
    assert quantization is not None
    headers = {
        key: Header(DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()
    }
    with pytest.raises(CheckpointError, match=reason) as caught:
        quantization.decoded(headers)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_what_is_not_read_is_left_to_be_refused() -> None:
    for settings in (
        None,
        {},
        {"quant_method": "bitsandbytes"},
        {"quant_method": ["gptq"]},
        "gptq",
    ):
        assert quantization_of({"quantization_config": settings}) is None
