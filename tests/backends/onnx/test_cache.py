"""The quantized KV cache in the graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import MODEL_FILE
from calib.artifact import QuantizedModel
from calib.errors import BackendError
from tests.backends.onnx.whole import batch, compare, quantized
from tests.tiny import CONFIGS
from tests.tolerances import FLIPS


@pytest.fixture(scope="module")
def cached() -> QuantizedModel:
    return quantized(CONFIGS["llama"](), kv="int8")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_prefill_and_decoding_are_the_reference(name: str, tmp_path: Path) -> None:
    """Weights only: but keys are rounded, so that a flip of one of them is possible as with
    quantized activations.
    """
    found = compare(quantized(CONFIGS[name](), kv="int8"), tmp_path)
    assert found.error <= FLIPS
    assert {tensor.dtype for tensor in found.cache} == {torch.int8}


def test_the_cache_is_stored_as_integers_and_every_projection_is_fused(
    cached: QuantizedModel, tmp_path: Path
) -> None:
    compare(cached, tmp_path)
    graph = onnx.load(tmp_path / MODEL_FILE, load_external_data=False).graph
    values = (*graph.input, *graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    assert {kind for name, kind in kinds.items() if "." in name} == {onnx.TensorProto.INT8}
    fusion = OnnxBackend().fusion(tmp_path, "ort")
    assert fusion is not None
    assert fusion.unfused == []
    assert fusion.quantized == len(cached.linears)


def test_cached_integers_are_the_rounded_keys(cached: QuantizedModel, tmp_path: Path) -> None:
    """Without the quantized cache the model gives the keys; those of the first layer depend on
    nothing rounded.
    """
    assert cached.cache is not None
    rows = batch()
    stored = compare(cached, tmp_path).cache
    plain = quantized(CONFIGS["llama"]())
    (tmp_path / "plain").mkdir()
    floats = compare(plain, tmp_path / "plain").cache
    real = rows.real[:, None, :, None]
    for index, scale in enumerate((cached.cache.key_scale[0], cached.cache.value_scale[0])):
        steps = (floats[index] / scale).round().clamp(-128, 127)
        apart = (stored[index].float() - steps).abs() * real
        assert float(apart.max()) <= 1  # a sum in another order may round to the next integer
        assert float((apart > 0).float().mean()) < 0.01
        assert float(steps.abs().max()) > 100  # the scale fits


def test_the_cache_is_read_back(cached: QuantizedModel, tmp_path: Path) -> None:
    compare(cached, tmp_path)
    found = OnnxBackend().read_cache(tmp_path, "ort")
    assert found is not None
    assert cached.cache is not None
    assert found.scheme == cached.cache.scheme
    for layer, scale in cached.cache.key_scale.items():
        assert torch.equal(found.key_scale[layer], scale)
        assert torch.equal(found.value_scale[layer], cached.cache.value_scale[layer])


def test_a_scale_that_the_graph_cannot_hold_is_refused(
    cached: QuantizedModel, tmp_path: Path
) -> None:
    from dataclasses import replace

    assert cached.cache is not None
    nothing = {layer: torch.zeros(()) for layer in cached.cache.key_scale}
    broken = replace(cached, cache=replace(cached.cache, value_scale=nothing))
    with pytest.raises(BackendError, match=r"scale of the cached '0.value' is 0"):
        compare(broken, tmp_path)
