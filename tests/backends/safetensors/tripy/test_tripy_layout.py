"""The bundle's numbers: a Tripy linear quantizes the float weight it holds and must meet the
artifact's integers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.safetensors.file_names import STATEMENT_FILE
from backends.safetensors.read import open_bundle, read_model
from backends.safetensors.source import even_block, even_scales, original_scales
from backends.safetensors.tripy.layout import TripyLayout
from calib.arithmetic.grids import Grid, dequantize, quantize
from calib.arithmetic.rounding import decode
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.errors import BackendError
from calib.schemes import (
    FLOAT8,
    INT4,
    INT8,
    LINEAR_SCHEMES,
    PerBlock,
    PerChannel,
    PerTensor,
    TensorScheme,
)
from tests.backends.safetensors.tripy.bundles import quantized, write
from tests.tiny import CONFIGS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODES = {
    "int8": torch.arange(-128, 128).to(torch.int8),
    "int4": torch.arange(-8, 8).to(torch.int8),
    "float8_e4m3": torch.tensor(sorted(set(range(256)) - {0x7F, 0xFF}), dtype=torch.uint8).view(
        torch.float8_e4m3fn
    ),
}
FORMATS = {fmt.name: fmt for fmt in (INT8, INT4, FLOAT8)}


def scales(dtype: torch.dtype) -> Tensor:
    """Every mantissa of 16-bit dtypes (a sample of float32's) in a few binades, and the smallest
    scales there are.
    """
    if dtype is torch.float32:
        mantissas = 1 + torch.rand(4096, generator=torch.Generator().manual_seed(0))
    else:
        mantissas = torch.arange(1.0, 2.0, torch.finfo(dtype).eps)
    found = torch.cat([mantissas * 2.0**exponent for exponent in (-14, -9, -3, 0, 4)]).to(dtype)
    tiny = torch.tensor([torch.finfo(dtype).tiny], dtype=dtype)
    return torch.cat([found, tiny]) if dtype is torch.float16 else found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODES)
def test_every_product_of_a_code_and_a_scale_quantizes_to_that_code(
    name: str, dtype: torch.dtype
) -> None:
    scheme = TensorScheme(FORMATS[name], PerChannel(0))
    scale = scales(dtype)
    codes = CODES[name].expand(len(scale), -1)

    products = (decode(codes, scheme.format) * scale.float()[:, None]).to(dtype)
    again = quantize(products, Grid(scale), scheme)

    kept = torch.isfinite(products)  # float16 ends at 65504; the layout refuses such a weight
    assert bool(kept.any(dim=1).all())
    assert torch.equal(decode(again, scheme.format)[kept], decode(codes, scheme.format)[kept])
    dequantized = (decode(again, scheme.format) * scale.float()[:, None]).to(dtype)
    assert torch.equal(dequantized[kept], products[kept])


def test_the_quotient_has_to_be_float32_for_int8_in_bfloat16() -> None:
    """Why the layout's docstring asks for it: in bfloat16 the quotient of 127 may be 126.5, which
    rounds to 126.
    """
    scale = scales(torch.bfloat16)
    codes = CODES["int8"].float()[None, :]
    products = (codes * scale.float()[:, None]).to(torch.bfloat16)
    narrow = (products / scale[:, None]).float().round().clamp(-128, 127)
    assert not torch.equal(narrow, codes.expand_as(narrow))


@pytest.mark.parametrize(
    ("width", "size"), [(48, 128), (88, 128), (704, 128), (256, 128), (96, 64), (24, 16)]
)
def test_blocks_that_do_not_divide_are_split_without_a_change(width: int, size: int) -> None:
    scheme = TensorScheme(INT4, PerBlock(size))
    generator = torch.Generator().manual_seed(width)
    scale = torch.rand(5, -(-width // size), generator=generator) + 0.1
    codes = torch.randint(-8, 8, (5, width), generator=generator).to(torch.int8)
    block = even_block("linear", width, scheme)
    even = even_scales(scale, width, size)

    assert width % block == 0
    assert even.shape == (5, width // block)
    assert torch.equal(
        dequantize(codes, Grid(even), TensorScheme(INT4, PerBlock(block))),
        dequantize(codes, Grid(scale), scheme),
    )
    assert torch.equal(original_scales(even, width, size), scale)


@pytest.mark.parametrize(
    ("width", "preset", "advice"),
    [
        (45, "int4-weight-only", "--block-size"),
        (88, "mxfp8", "in float"),
        (24, "nvfp4", "in float"),
    ],
)
def test_blocks_that_no_runtime_has_are_refused(width: int, preset: str, advice: str) -> None:
    with pytest.raises(BackendError, match=rf"the {width} input features of 'a\.linear'") as caught:
        even_block("a.linear", width, LINEAR_SCHEMES[preset].weight)
    assert advice in (caught.value.hint or "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", "int8"),
        ("gpt2", "int8-weight-only"),
        ("gpt2", "int4-weight-only"),
        ("qwen2", "w4a8"),
        ("mistral", "float8"),
    ],
)
def test_a_bundle_reads_back_to_the_last_bit(
    family: str, scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = quantized(family, scheme, dtype=dtype)
    back = read_model(open_bundle(write(model, tmp_path / "b"), verify=True), TripyLayout())
    assert back.linears.keys() == model.linears.keys()
    for name, linear in model.linears.items():
        assert same(linear.tensors(), back.linears[name].tensors()), name
    assert same(model.floats, back.floats)


def same(a: object, b: object) -> bool:
    assert isinstance(a, dict)
    assert isinstance(b, dict)
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key].float(), b[key].float()) for key in a
    )


def test_keys_shapes_and_dtypes_are_those_of_the_modules(tmp_path: Path) -> None:
    forms = {
        scheme: open_bundle(
            write(quantized("gpt2", scheme, (), torch.float16), tmp_path / scheme)
        ).manifest.tensors
        for scheme in ("int8-weight-only", "int4-weight-only", "float8")
    }
    shapes = {
        scheme: {
            key: (entry.dtype, entry.shape)
            for key, entry in found.items()
            if ".h.0.mlp.c_fc." in key
        }
        for scheme, found in forms.items()
    }
    name, half = "transformer.h.0.mlp.c_fc", "float16"
    bias = {f"{name}.bias": (half, [192])}
    assert shapes == {
        "int8-weight-only": {
            f"{name}.weight": (half, [192, 48]),
            f"{name}.weight_scale": (half, [192]),
            **bias,
        },
        "int4-weight-only": {
            f"{name}.weight": (half, [48, 192]),
            f"{name}.weight_scale": (half, [3, 192]),
            **bias,
        },
        "float8": {
            f"{name}.weight": (half, [192, 48]),
            f"{name}.weight_scale": (half, []),
            f"{name}.input_scale": (half, []),
            **bias,
        },
    }
    assert forms["float8"]["transformer.h.0.ln_1.weight"].dtype == "float32"
    assert "transformer.wpe.weight" in forms["float8"]
    assert forms["float8"]["lm_head.weight"].shape == [97, 48]


def test_the_bundle_states_axis_and_block(tmp_path: Path) -> None:
    folder = write(quantized("gpt2", "w4a8", ()), tmp_path / "b")
    stated = json.loads((folder / STATEMENT_FILE).read_text(encoding="utf-8"))
    assert stated["linears"]["transformer.h.0.attn.c_attn"] == {
        "quant_dtype": "int4",
        "input_dtype": "int8",
        "orientation": "in, out",
        "axis": 0,
        "block_size": 16,
    }


def test_act_order_reads_back(tmp_path: Path) -> None:
    model = quantized("llama", "int4-weight-only", ())
    name = "model.layers.0.self_attn.q_proj"
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    changed = reordered(model, name, order)
    back = read_model(open_bundle(write(changed, tmp_path / "b")), TripyLayout())
    assert torch.equal(back.linears[name].values(), changed.linears[name].values())
    assert not torch.equal(back.linears[name].values(), model.linears[name].values())


def reordered(model: QuantizedModel, name: str, order: Tensor) -> QuantizedModel:
    return replace(
        model, linears={**model.linears, name: replace(model.linears[name], weight_order=order)}
    )


def test_a_weight_that_overflows_is_refused(tmp_path: Path) -> None:
    model = quantized("llama", "int8-weight-only", (), torch.float16)
    name = "model.layers.0.self_attn.q_proj"
    huge: QuantizedLinear = replace(
        model.linears[name],
        weight=torch.full((48, 48), -128, dtype=torch.int8),
        weight_scale=torch.full((48,), 65500 / 127).half(),
    )
    with pytest.raises(BackendError, match=f"'{name}' overflow float16"):
        write(replace(model, linears={**model.linears, name: huge}), tmp_path / "b")


def test_models_without_a_module_are_refused() -> None:
    layout = TripyLayout()
    for family in ("llama", "llama-bias-tied-headdim", "mistral", "qwen2", "gpt2"):
        assert layout.model_refusal(CONFIGS[family]().to_dict(), {}) is None
    for family in ("granite", "qwen3", "mixtral", "phi3", "opt", "gemma"):
        found = layout.model_refusal(CONFIGS[family]().to_dict(), {})
        assert found is not None
        assert CONFIGS[family]().model_type in found.reason
    varying = CONFIGS["llama"]()
    varying.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "rotary" in str(layout.model_refusal(varying.to_dict(), {}))
    embedding = {"model.embed_tokens": LINEAR_SCHEMES["int8-weight-only"]}
    assert "model.embed_tokens" in str(
        layout.model_refusal(CONFIGS["llama"]().to_dict(), embedding)
    )


def test_one_scale_for_a_tensor_has_rank_zero() -> None:
    linear = quantized("llama", "float8", ()).linears["model.layers.0.mlp.up_proj"]
    assert isinstance(linear.weight_scheme.granularity, PerTensor)
    assert linear.weight_scale.shape == ()
