"""The quantized KV cache: what is observed is what attention reads, and rounding it is rounding
keys and values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.errors import QuantizationError
from calib.fusing import materialize
from calib.measure.floor import split_logits
from calib.measure.reference import build_reference
from calib.network.kv_cache import observe_caches
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.schemes import scheme_named
from tests.tiny import CONFIGS, PROVENANCE, fuse_tiny, make_tiny, relative_l2, token_rows

FAMILIES = ["llama", "qwen3", "gpt2", "opt", "phi3", "gpt_neox", "gemma", "smollm3", "mixtral"]


def loop() -> Any:
    return forward_loop_over(length_batches(token_rows(), 4))


def cached(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that transformers itself puts into its cache, of every layer, over all
    rows.
    """
    found: list[list[tuple[Tensor, Tensor]]] = []
    for row in token_rows():
        cache = model(input_ids=row[None], use_cache=True).past_key_values
        found.append([(layer.keys, layer.values) for layer in cache.layers])
    layers = zip(*found, strict=True)
    return [
        tuple(torch.cat([pair[i].flatten() for pair in layer]) for i in (0, 1)) for layer in layers
    ]  # type: ignore[misc]


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_are_the_amax_of_what_is_cached(name: str) -> None:
    tiny = make_tiny(CONFIGS[name]())
    kinds = [kind for kind in tiny.offered() if kind in ("r1", "r2", "r3")]
    fused = fuse_tiny(tiny, kinds)
    model = materialize(fused)
    names = {layer: fused.wiring.attention(layer) for layer in range(2)}
    implementation = model.config._attn_implementation
    found = observe_caches(model, names, loop())
    assert model.config._attn_implementation == implementation  # nothing is left behind
    for layer, (keys, values) in enumerate(cached(model)):
        # rows were batched for the calibration, which moves a sum by a few eps
        assert float(found[layer][0]) == pytest.approx(float(keys.abs().max()), rel=1e-4)
        assert float(found[layer][1]) == pytest.approx(float(values.abs().max()), rel=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_the_reference_rounds_keys_and_values(kind: str) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()), ["r3"])
    plain = resolve(scheme_named("int8-weight-only"), fused.wiring)
    with_cache = resolve(scheme_named("int8-weight-only"), fused.wiring, kv=kind)
    ids = torch.stack(token_rows([11, 11]))
    logits = {}
    for how in (plain, with_cache):
        quantized = quantize_model(fused, how, loop(), PROVENANCE)
        reference = build_reference(quantized)
        logits[how.cache is None] = [
            reference(input_ids=ids).logits,
            split_logits(reference)(ids),
        ]
    error = relative_l2(logits[False][0], logits[True][0])
    # by steps of 1/127, 1/7, 1/16
    low, high = {"int8": (1e-4, 0.05), "int4": (0.01, 1.0), "float8": (1e-3, 0.3)}[kind]
    assert low < error < high
    # the split sum rounds the same cache: it differs by a few flips, not by what the cache costs
    assert relative_l2(logits[False][1], logits[False][0]) < error / 2 or kind == "int8"


def test_an_attention_that_is_never_reached_is_named() -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()))
    model = materialize(fused)
    with pytest.raises(QuantizationError, match=r"never reached the attention of model\.layers\.0"):
        observe_caches(model, {0: "model.layers.0.self_attn"}, lambda module: None)
