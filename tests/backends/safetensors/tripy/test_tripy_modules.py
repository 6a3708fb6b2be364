"""Bundles in Tripy modules through its real front end: its keys, its checks, its traces, and the
numbers of these.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import backends
from backends.safetensors.read import open_bundle
from calib.architectures import Kind
from calib.arithmetic.grids import quantize, weight_grid
from calib.artifact import QuantizedModel
from calib.errors import BackendError
from calib.measure.reference import build_reference
from tests.backends.safetensors.tripy.bundles import quantized, reference_logits, token_ids, write
from tests.backends.safetensors.tripy.conftest import Run
from tests.backends.safetensors.tripy.test_tripy_layout import reordered
from tests.tiny import CONFIGS, relative_l2
from tests.tolerances import FLIPS, NAIVE, WEIGHT_ONLY

pytestmark = pytest.mark.runtimes
ONLINE: tuple[Kind, ...] = ("r1", "r2", "r3", "r4")
CASES: list[tuple[str, str, tuple[Kind, ...]]] = [
    ("llama", "int8", ONLINE),
    ("llama-bias-tied-headdim", "int8-weight-only", ("r1", "r2")),
    ("mistral", "float8", ()),
    ("qwen2", "int4-weight-only", ONLINE),
    ("qwen2", "w4a8", ()),
    ("gpt2", "int8-weight-only", ("r1", "r2")),
    ("gpt2-untied-inner", "int4-weight-only", ONLINE),
    ("gpt2", "float8", ()),
]


@pytest.fixture
def build(tp: Any) -> Any:
    """The module with ``module_for_bundle`` and ``module_for_config``; it imports nvtripy."""
    return import_module("backends.safetensors.tripy.modules.build")


@pytest.mark.parametrize(("family", "scheme", "kinds"), CASES)
def test_a_filled_module_computes_the_fake_quantized_model(
    family: str, scheme: str, kinds: tuple[Kind, ...], build: Any, run: Run, tmp_path: Path
) -> None:
    model = quantized(family, scheme, kinds)
    folder = write(model, tmp_path / "b")
    module = build.module_for_bundle(folder)
    assert set(module.state_dict()) == set(open_bundle(folder).manifest.tensors)

    assert backends.load_bundle(module, folder) is module
    ids = token_ids()
    found, expected = run(module, ids), reference_logits(model, ids)
    error = relative_l2(found, expected)
    if scheme.endswith("weight-only"):
        assert error <= WEIGHT_ONLY
    else:  # FLIPS alone would not notice inputs that stay in float
        assert error <= min(
            FLIPS, 0.5 * relative_l2(reference_logits(with_float_inputs(model), ids), expected)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype, build: Any, run: Run, tmp_path: Path) -> None:
    model = quantized("llama", "int8-weight-only", ("r1", "r4"), dtype)
    folder = write(model, tmp_path / "b")
    module = backends.load_bundle(build.module_for_bundle(folder), folder)
    ids = token_ids()
    reference = reference_logits(model, ids)
    naive: Any = build_reference(model, dtype=dtype)
    bound = NAIVE * relative_l2(naive(ids).logits.float(), reference)
    assert relative_l2(run(module, ids), reference) <= bound


def test_act_order_is_undone_by_a_gather(build: Any, run: Run, tmp_path: Path) -> None:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    model = reordered(
        quantized("llama", "int4-weight-only", ()), "model.layers.0.self_attn.q_proj", order
    )
    folder = write(model, tmp_path / "b")
    module = backends.load_bundle(build.module_for_bundle(folder), folder)
    ids = token_ids()
    assert relative_l2(run(module, ids), reference_logits(model, ids)) <= WEIGHT_ONLY


@pytest.mark.parametrize("mode", ["int8-weight-only", "int4-weight-only", "float8", "w4a8"])
def test_a_module_from_a_config_takes_a_bundle_of_that_scheme(
    mode: str, build: Any, tp: Any, tmp_path: Path
) -> None:
    folder = write(quantized("qwen2", mode, ()), tmp_path / "b")
    backends.load_bundle(
        build.module_for_config(CONFIGS["qwen2"]().to_dict(), tp.float32, mode), folder
    )


def test_modules_that_do_not_exist(build: Any, tp: Any) -> None:
    with pytest.raises(BackendError, match="no Tripy module for granite"):
        build.module_for_config(CONFIGS["granite"]().to_dict(), tp.float32, "int8-weight-only")
    with pytest.raises(BackendError, match="cannot express nvfp4"):
        build.module_for_config(CONFIGS["llama"]().to_dict(), tp.float32, "nvfp4")
    for dtype in (tp.int8, torch.float16, "float16"):
        with pytest.raises(BackendError, match=f"cannot be '{dtype}'"):
            build.module_for_config(CONFIGS["llama"]().to_dict(), dtype, "int8-weight-only")


@pytest.mark.parametrize("mode", ["int8-weight-only", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_keys_fit_nvidias_example(
    mode: str, dtype: torch.dtype, tp: Any, run: Run, tmp_path: Path
) -> None:
    """With float8 the example also quantizes the head, so its bundle is exported with that
    override.
    """
    nano = example()
    name = str(dtype).removeprefix("torch.")
    model = quantized("gpt2", mode, ("r1", "r2"), dtype)
    if mode == "float8":
        model = with_head(model)
    module = nano.GPT(nano.Sizes(dtype=getattr(tp, name), mode=mode))
    masks = [block.attn.bias for block in module.transformer.h]

    backends.load_bundle(module, write(model, tmp_path / "b"))

    assert [block.attn.bias for block in module.transformer.h] == masks
    # a fixed bound holds there; it has GELU by the error function, not GPT-2's tanh formula
    if dtype is torch.float32:
        same = replace(model, config={**model.config, "activation_function": "gelu"})
        ids = token_ids()
        bound = WEIGHT_ONLY if mode == "int8-weight-only" else FLIPS
        assert relative_l2(run(module, ids), reference_logits(same, ids)) <= bound


def test_nvidias_int4_module_is_refused_by_name(tp: Any, tmp_path: Path) -> None:
    nano = example()
    module = nano.GPT(nano.Sizes(mode="int4-weight-only"))
    folder = write(quantized("gpt2", "int4-weight-only", ()), tmp_path / "b")
    with pytest.raises(
        BackendError, match=r"use BlockLinear: transformer\.h\.\{0-1\}\.attn\.c_attn"
    ):
        backends.load_bundle(module, folder)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "scheme", "kinds"), CASES)
def test_compiled(
    family: str,
    scheme: str,
    kinds: tuple[Kind, ...],
    build: Any,
    tp: Any,
    compiles: bool,
    tmp_path: Path,
) -> None:
    if not compiles:
        pytest.skip("needs a CUDA device, and mlir_tensorrt from NVIDIA's index")
    model = quantized(family, scheme, kinds)
    folder = write(model, tmp_path / "b")
    module = backends.load_bundle(build.module_for_bundle(folder), folder)
    ids = token_ids()
    compiled = tp.compile(module, args=[tp.InputInfo(tuple(ids.shape), dtype=tp.int32)])
    logits = torch.from_dlpack(compiled(tp.Tensor(ids.to(device="cuda", dtype=torch.int32)))).cpu()
    # Matmuls may run in TensorFloat32, of 10 bits: coarser than any weight-only bound for float32.
    assert relative_l2(logits, reference_logits(model, ids)) <= FLIPS


def example() -> Any:
    name = "tests.backends.safetensors.tripy.nano_gpt"
    sys.modules.pop(name, None)  # its classes are those of the nvtripy that it was imported with
    return import_module(name)


def with_float_inputs(model: QuantizedModel) -> QuantizedModel:
    linears = {
        name: replace(linear, input_scheme=None, input_scale=None)
        for name, linear in model.linears.items()
    }
    return replace(model, linears=linears)


def with_head(model: Any) -> Any:
    """``model`` with its float output head quantized as its other linears are, on inputs of up to
    4.
    """
    like = next(iter(model.linears.values()))
    weight = model.floats["lm_head.weight"]
    grid = weight_grid(weight, like.weight_scheme, model.dtype)
    head = replace(
        like,
        name="lm_head",
        weight=quantize(weight, grid, like.weight_scheme),
        weight_scale=grid.scale,
        bias=None,
        input_scale=torch.tensor(4 / 448, dtype=model.dtype),
    )
    floats = {key: tensor for key, tensor in model.floats.items() if key != "lm_head.weight"}
    return replace(model, linears={**model.linears, "lm_head": head}, floats=floats)
