"""Bundles in networks of TensorRT's Python API: they build ahead of time, and compute the
fake-quantized model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.base import RuntimeMissing
from backends.safetensors.tensorrt.example_llama_block import add_block, build_block, run_block
from backends.safetensors.tensorrt.loader import (
    BundleWeights,
    fill_network,
    open_weights,
    refit_engine,
)
from backends.safetensors.tensorrt.network import NetworkBuilder
from calib.architectures import Kind
from calib.errors import BackendError
from tests.backends.safetensors.tensorrt.bundles import (
    TOKENS,
    layer_values,
    quantized,
    with_cache,
    write,
)
from tests.backends.safetensors.tensorrt.interpreter import run
from tests.tiny import relative_l2
from tests.tolerances import FLIPS, LINEAR, WEIGHT_ONLY

pytestmark = pytest.mark.runtimes
ROTATED: tuple[Kind, ...] = ("r1", "r2", "r4")
CASES = [
    ("llama", "int8", ROTATED, "SM86"),
    ("qwen2", "int8-weight-only", ROTATED, "SM86"),
    ("mistral", "int8-weight-only", (), "SM86"),
    ("wide", "int4-weight-only", ROTATED, "SM86"),
    ("wide", "w4a8", ROTATED, "SM89"),
    ("wide", "float8", ROTATED, "SM89"),
    ("wide", "mxfp8", ROTATED, "SM89"),
    ("wide", "nvfp4", ROTATED, "SM120"),
]
"""Model, scheme, rotations, and the first GPU that has such kernels."""


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.fixture
def network(trt: Any) -> Any:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    made = builder.create_network(0)
    yield made
    del builder


@pytest.mark.parametrize(("family", "scheme", "kinds", "gpu"), CASES)
def test_a_block_computes_the_fake_quantized_layer(
    family: str,
    scheme: str,
    kinds: tuple[Kind, ...],
    gpu: str,
    trt: Any,
    network: Any,
    tmp_path: Path,
) -> None:
    model = quantized(family, scheme, kinds)
    weights = open_weights(write(model, tmp_path / "b"), trt)
    kept = add_block(network, weights, layer=1, tokens=TOKENS)
    x, y = layer_values(model, 1)
    error = relative_l2(run(network, weights, {"hidden_states": x}), y)
    if scheme.endswith("weight-only"):
        assert error <= WEIGHT_ONLY
    else:  # FLIPS alone would not notice inputs that stay in float
        floats = {
            name: replace(linear, input_scheme=None, input_scale=None)
            for name, linear in model.linears.items()
        }
        rounding = relative_l2(layer_values(replace(model, linears=floats), 1, x)[1], y)
        assert error <= min(FLIPS, 0.5 * rounding)
    del kept


@pytest.mark.parametrize(("family", "scheme", "kinds", "gpu"), CASES)
def test_a_block_builds_ahead_of_time(
    family: str, scheme: str, kinds: tuple[Kind, ...], gpu: str, trt: Any, tmp_path: Path
) -> None:
    folder = write(quantized(family, scheme, kinds, torch.float16), tmp_path / "b")
    capabilities = ("SM86", "SM89") if gpu == "SM86" else (gpu,)
    assert len(build_block(folder, layer=0, tokens=TOKENS, capabilities=capabilities, trt=trt)) > 0


def test_what_a_gpu_has_no_kernel_for_is_an_error(trt: Any, tmp_path: Path) -> None:
    folder = write(quantized("wide", "nvfp4", (), torch.float16), tmp_path / "b")
    with pytest.raises(BackendError, match="for SM86"):
        build_block(folder, layer=0, tokens=TOKENS, capabilities=("SM86",), trt=trt)


def test_what_the_example_does_not_build(trt: Any, tmp_path: Path) -> None:
    folder = write(quantized("gpt2", "int8-weight-only", ()), tmp_path / "gpt2")
    with pytest.raises(BackendError, match="not of 'gpt2'"):
        build_block(folder, layer=0, tokens=TOKENS, trt=trt)
    model = quantized("llama", "int8", ROTATED)
    folder = write(replace(model, config={**model.config, "hidden_act": "gelu"}), tmp_path / "gelu")
    with pytest.raises(BackendError, match="not with 'gelu'"):
        build_block(folder, layer=0, tokens=TOKENS, trt=trt)
    with pytest.raises(BackendError, match="layers 0 to 1, and no layer 2"):
        build_block(write(model, tmp_path / "llama"), layer=2, tokens=TOKENS, trt=trt)


def test_experts_share_the_rotation_of_their_parameter(
    trt: Any, network: Any, tmp_path: Path
) -> None:
    model = quantized("mixtral", "int8-weight-only", ROTATED)
    weights = open_weights(write(model, tmp_path / "b"), trt)
    name = "model.layers.1.mlp.experts.down_proj.2"
    net = NetworkBuilder(network, weights)
    network.mark_output(net.linear(network.add_input("x", net.dtype, (5, 88)), name))
    x = torch.randn(5, 88, generator=torch.Generator().manual_seed(0))
    rotation = model.rotations.r4(1)
    assert rotation is not None
    expected = rotation.apply(x) @ model.linears[name].values().T
    assert relative_l2(run(network, weights, {"x": x}), expected) <= LINEAR


def test_heads_are_rotated_where_their_cache_is_quantized(
    trt: Any, network: Any, tmp_path: Path
) -> None:
    """Scales of the cache are those of rotated keys. The inputs of projections are not rotated by
    what is theirs.
    """
    model = with_cache(quantized("llama", "int8-weight-only", ("r3",)))
    weights = open_weights(write(model, tmp_path / "b"), trt)
    net = NetworkBuilder(network, weights)
    heads = net.rotate(network.add_input("heads", net.dtype, (6, 8)), "model.layers.1.self_attn")
    network.mark_output(heads)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    rotation = model.rotations.r3(1)
    assert rotation is not None
    assert relative_l2(run(network, weights, {"heads": x}), rotation.apply(x)) <= LINEAR

    plain = NetworkBuilder(network, weights)
    before = network.num_layers
    plain.linear(network.add_input("x", net.dtype, (6, 48)), "model.layers.1.self_attn.q_proj")
    kinds = [network.get_layer(index).type.name for index in range(before, network.num_layers)]
    assert kinds == ["CONSTANT", "CONSTANT", "DEQUANTIZE", "MATRIX_MULTIPLY"]


def test_running_needs_a_gpu(trt: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeMissing):
        run_block(b"", torch.zeros(1, 1), trt)


@pytest.fixture
def weights(trt: Any, tmp_path: Path) -> BundleWeights:
    return open_weights(
        write(quantized("wide", "int4-weight-only", (), torch.float16), tmp_path / "b"), trt
    )


def placeholders(network: Any, weights: BundleWeights, **changes: Any) -> None:
    """An empty constant for every tensor, as a network that is filled later has them."""
    trt = weights.trt
    for key, form in weights.forms.items():
        dtype, shape = changes.get(key, (form.dtype, form.shape))
        layer = network.add_constant(shape, trt.Weights(getattr(trt.DataType, dtype)))
        layer.name = key


def constants(network: Any, trt: Any) -> dict[str, Any]:
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        layer.__class__ = trt.IConstantLayer
    return {layer.name: layer for layer in layers}


def test_a_network_is_filled_by_name(trt: Any, network: Any, weights: BundleWeights) -> None:
    placeholders(network, weights)
    own = torch.ones(2, 2).half()
    network.add_constant((2, 2), trt.Weights(trt.float16, own.data_ptr(), 4)).name = "mask"
    fill_network(network, weights)
    layers = constants(network, trt)
    gain = layers["model.layers.0.input_layernorm.weight"]
    expected = weights.bundle.tensors["model.layers.0.input_layernorm.weight"]
    assert torch.equal(torch.tensor(gain.weights), expected)
    assert layers["model.layers.0.mlp.up_proj.weight"].weights.size == 96 * 64
    assert torch.tensor(layers["mask"].weights).tolist() == [1.0] * 4


def test_what_does_not_fit_a_network_is_named_at_once(
    trt: Any, network: Any, weights: BundleWeights
) -> None:
    up = "model.layers.0.mlp.up_proj"
    placeholders(
        network,
        weights,
        **{f"{up}.weight": ("INT4", (64, 96)), "model.norm.weight": ("FLOAT", (96,))},
    )
    network.add_constant((3,), trt.Weights(trt.float16)).name = "model.missing"
    with pytest.raises(BackendError) as caught:
        fill_network(network, weights)
    message = str(caught.value)
    assert f"INT4 [64, 96] where the bundle has INT4 [96, 64]: {up}.weight" in message
    assert "FLOAT [96] where the bundle has HALF [96]: model.norm.weight" in message
    assert "not in the bundle: model.missing" in message
    assert all(layer.weights.size == 0 for layer in constants(network, trt).values())


def test_a_network_of_a_part(trt: Any, network: Any, weights: BundleWeights) -> None:
    form = weights.forms["model.norm.weight"]
    network.add_constant(form.shape, trt.Weights(trt.float16)).name = "model.norm.weight"
    with pytest.raises(BackendError, match=r"without a constant: lm_head\.weight"):
        fill_network(network, weights)
    fill_network(network, weights, partial=True)
    assert constants(network, trt)["model.norm.weight"].weights.size == 96


def test_scales_for_qdq_layers(trt: Any, tmp_path: Path) -> None:
    model = quantized("wide", "nvfp4", ())
    weights = open_weights(write(model, tmp_path / "b"), trt)
    name = "model.layers.0.mlp.up_proj"
    scales, linear = weights.scales(name), model.linears[name]
    assert torch.equal(scales.weight.float(), linear.weight_scale.T)
    assert linear.weight_second_scale is not None
    assert torch.equal(scales.weight_second, linear.weight_second_scale)
    assert torch.equal(scales.input, linear.input_scale)
    with pytest.raises(KeyError):
        weights.scales("lm_head")


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "scheme", "kinds", "gpu"), CASES)
def test_a_block_runs(
    family: str, scheme: str, kinds: tuple[Kind, ...], gpu: str, trt: Any, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < int(gpu.removeprefix("SM")):
        pytest.skip(f"needs {gpu}")
    model = quantized(family, scheme, kinds, torch.float16)
    plan = build_block(write(model, tmp_path / "b"), layer=1, tokens=TOKENS, trt=trt)
    x, y = layer_values(model, 1)
    found = run_block(plan, x.half().cuda(), trt).float().cpu()
    assert relative_l2(found, y) <= FLIPS


@pytest.mark.gpu
def test_an_engine_is_refitted(trt: Any, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    first = write(quantized("wide", "int8-weight-only", (), torch.float16), tmp_path / "first")
    model = quantized("wide", "int8-weight-only", ROTATED[:2], torch.float16)
    second = write(model, tmp_path / "second")
    logger = trt.Logger(trt.Logger.ERROR)
    plan = build_block(first, layer=1, tokens=TOKENS, refit=True, trt=trt)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    refit_engine(engine, open_weights(second, trt), logger)
    x, y = layer_values(model, 1)
    found = run_block(bytes(engine.serialize()), x.half().cuda(), trt).float().cpu()
    assert relative_l2(found, y) <= FLIPS
