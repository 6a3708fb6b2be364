"""One orientation, ``[out, in]``, and the way to a module tree and back."""

from __future__ import annotations

import pytest
import torch

from calib.measure.reference import build_reference
from calib.network.layout import StockTensors, oriented
from calib.network.skeleton import expected_tensors, oriented_shapes
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, quantize_fused, relative_l2, token_rows
from tests.tolerances import SAME_SUMS


@pytest.mark.parametrize("name", ["llama", "gpt2-untied-inner", "mixtral"])
def test_every_linear_is_out_in_and_turned_back_for_a_module_tree(name: str) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS[name]()), ["r1", "r2"])
    wiring = fused.wiring
    shapes = oriented_shapes(wiring)
    assert {key: tuple(tensor.shape) for key, tensor in fused.state.items()} == shapes

    stock = StockTensors(fused.state, wiring)
    assert list(stock) == list(fused.state)
    assert len(stock) == len(fused.state)
    assert "absent" not in stock
    turned = wiring.turned_weights
    assert bool(turned) == name.startswith("gpt2")
    for key, shape in expected_tensors(fused.config).items():
        assert stock[key].shape == shape
        assert stock[key].is_contiguous()
        assert torch.equal(stock[key], fused.state[key].mT if key in turned else fused.state[key])

    back = oriented(stock, wiring)
    assert all(back[key].data_ptr() == stock[key].data_ptr() for key in turned)
    assert all(torch.equal(back[key], tensor) for key, tensor in fused.state.items())


def test_a_float_linear_of_gpt2_is_out_in_in_the_artifact_and_computes() -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["gpt2-untied-inner"]()))
    quantized = quantize_fused(fused, "float")
    weight = quantized.floats["transformer.h.0.attn.c_attn.weight"]
    assert tuple(weight.shape) == (3 * 48, 48)
    ids = token_rows()[1][None]
    with torch.no_grad():
        found = build_reference(quantized)(input_ids=ids).logits
    expected = make_tiny(CONFIGS["gpt2-untied-inner"]()).model(torch.float32)(input_ids=ids).logits
    assert relative_l2(found, expected.detach()) <= 10 * SAME_SUMS
