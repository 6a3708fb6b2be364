"""A prefix in networks of TensorRT: as constants of the example's layer, or for a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.safetensors.tensorrt.example_llama_block import add_block, build_block
from backends.safetensors.tensorrt.loader import fill_network, open_weights
from calib.architectures import Kind
from calib.artifact import QuantizedModel
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
PREFIX = (5, 7, 11)
SCHEME = "int8-weight-only"
ONLINE: tuple[Kind, ...] = ("r1", "r2", "r3", "r4")
CASES: list[tuple[str, str, tuple[Kind, ...]]] = [
    ("llama", SCHEME, ONLINE),  # its keys are the artifact's without R3
    ("llama", "int8", ONLINE),
    ("qwen2", SCHEME, ("r1", "r2")),
    ("mistral", SCHEME, ()),  # its window is shorter than the row
]


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.fixture
def network(trt: Any) -> Any:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    made = builder.create_network(0)
    yield made
    del builder


def keys(model: QuantizedModel, layer: int) -> torch.Tensor:
    assert model.prefix is not None
    return model.prefix.keys[layer]


@pytest.mark.parametrize(("family", "scheme", "kinds"), CASES)
def test_a_block_computes_the_layer_behind_its_prefix(
    family: str, scheme: str, kinds: tuple[Kind, ...], trt: Any, network: Any, tmp_path: Path
) -> None:
    model = quantized(family, scheme, kinds, prefix=PREFIX)
    weights = open_weights(write(model, tmp_path / "b"), trt)
    kept = add_block(network, weights, layer=1, tokens=TOKENS)
    x, y = layer_values(model, 1)
    bound = WEIGHT_ONLY if scheme == SCHEME else FLIPS
    assert relative_l2(run(network, weights, {"hidden_states": x}), y) <= bound
    # the bound tells it from a layer that forgot the prefix
    assert relative_l2(layer_values(replace(model, prefix=None), 1, x)[1], y) > 2 * bound
    del kept


def test_where_keys_of_a_quantized_cache_are_rotated_those_of_the_text_are(
    trt: Any, network: Any, tmp_path: Path
) -> None:
    """The example has no cache that would round them, so it computes the model without one."""
    model = quantized("llama", SCHEME, ONLINE, prefix=PREFIX)
    weights = open_weights(write(with_cache(model), tmp_path / "b"), trt)
    kept = add_block(network, weights, layer=1, tokens=TOKENS)
    x, y = layer_values(model, 1)
    assert relative_l2(run(network, weights, {"hidden_states": x}), y) <= WEIGHT_ONLY
    del kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_block_with_a_prefix_builds_ahead_of_time(
    dtype: torch.dtype, trt: Any, tmp_path: Path
) -> None:
    folder = write(quantized("llama", SCHEME, ONLINE, dtype, PREFIX), tmp_path / "b")
    assert build_block(folder, layer=0, tokens=TOKENS, capabilities=("SM86",), trt=trt)


def test_keys_and_values_for_a_cache(trt: Any, tmp_path: Path) -> None:
    """Keys are rotated where the bundle's network rotates them, and only there."""
    model = quantized("llama", SCHEME, ONLINE, prefix=PREFIX)
    prefix = open_weights(write(model, tmp_path / "float"), trt).prefix
    cached = open_weights(write(with_cache(model), tmp_path / "quantized"), trt).prefix
    assert prefix is not None
    assert cached is not None
    assert model.prefix is not None
    assert prefix.tokens == cached.tokens == PREFIX
    for layer in (0, 1):
        rotation = model.rotations.r3(layer)
        assert rotation is not None
        assert torch.equal(cached.keys[layer], keys(model, layer))
        assert relative_l2(rotation.apply(prefix.keys[layer]), keys(model, layer)) <= LINEAR
        assert torch.equal(prefix.values[layer], model.prefix.values[layer])

    plain = quantized("llama", SCHEME, ONLINE)
    assert open_weights(write(plain, tmp_path / "plain"), trt).prefix is None


def test_a_network_may_have_constants_for_it_or_a_cache(
    trt: Any, network: Any, tmp_path: Path
) -> None:
    model = quantized("llama", SCHEME, (), prefix=PREFIX)
    weights = open_weights(write(model, tmp_path / "b"), trt)
    place = "model.layers.1.self_attn.prefix.key"
    for key in weights.bundle.manifest.tensors:
        form = weights.forms[key]
        empty = trt.Weights(getattr(trt.DataType, form.dtype))
        network.add_constant(form.shape, empty).name = key
    fill_network(network, weights)

    layer = network.add_constant(weights.forms[place].shape, trt.Weights(trt.float32))
    layer.name = place
    fill_network(network, weights)
    assert torch.equal(torch.tensor(layer.weights).reshape(tuple(layer.shape)), keys(model, 1))

    network.add_constant((1,), trt.Weights(trt.float32)).name = "model.layers.2.prefix.key"
    with pytest.raises(BackendError, match=r"not in the bundle: model\.layers\.2\.prefix\.key"):
        fill_network(network, weights)
