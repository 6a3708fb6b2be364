"""Families that the census proves become graphs that compute what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backends.onnx.placeholders import open_up
from calib.architectures import wiring_for
from calib.network import build_on_meta
from tests.backends.onnx.families import check_kept_norms, check_prefill_and_decoding
from tests.backends.onnx.whole import batch, compare, quantized
from tests.rows import ROWS
from tests.tiny import make_tiny, relative_l2
from tests.tolerances import WEIGHT_ONLY


def test_a_router_that_derives_from_a_linear_is_traced_as_it_is() -> None:
    wiring = wiring_for(ROWS["phimoe"]())
    network = build_on_meta(wiring.config)
    router = network.get_submodule("model.layers.0.mlp.router")
    assert isinstance(router, torch.nn.Linear)
    open_up(network, wiring)
    assert network.get_submodule("model.layers.0.mlp.router") is router
    assert not isinstance(network.lm_head, torch.nn.Linear)


@pytest.mark.census
@pytest.mark.parametrize("name", ROWS)
def test_the_rotated_float_graph_is_the_original(name: str, tmp_path: Path) -> None:
    """Prefill, decoding and left padding, against transformers' eager attention and the weights of
    the checkpoint.
    """
    config = ROWS[name]()
    found = compare(quantized(config, scheme="float"), tmp_path)
    original = make_tiny(config).model(torch.float32)
    original.set_attn_implementation("eager")
    rows = batch()
    with torch.no_grad():
        output = original(input_ids=rows.ids, attention_mask=rows.mask, position_ids=rows.positions)
    wanted = output.logits[rows.real]
    assert relative_l2(found.prefill, wanted) <= WEIGHT_ONLY
    assert relative_l2(found.decoded, wanted) <= WEIGHT_ONLY


@pytest.mark.census
@pytest.mark.parametrize("name", ROWS)
def test_prefill_and_decoding_are_the_reference(name: str, tmp_path: Path) -> None:
    check_prefill_and_decoding(name, tmp_path)


@pytest.mark.census
@pytest.mark.parametrize("name", ROWS)
def test_kept_norms_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    check_kept_norms(name, tmp_path)
