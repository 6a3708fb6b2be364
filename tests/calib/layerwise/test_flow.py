"""What flows block by block is what the whole model computes: final hidden states, logits,
statistics, prefixes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calib.capture.session import capture
from calib.capture.sites import CaptureConfig
from calib.fusing import FusedModel, fuse, materialize, with_prefix
from calib.layerwise import Flow
from calib.layerwise.capture import capture_blockwise, fused_fingerprint
from calib.layerwise.massive import massive_inputs_blockwise
from calib.layerwise.prefix import with_prefix_blockwise
from calib.stats.massive import massive_inputs
from tests.calib.layerwise.layerwise_support import batches
from tests.tiny import CONFIGS, Tiny, make_tiny, token_rows

FAMILIES = ["gpt2", "opt", "granite", "gemma2", "mixtral"]
SMALL = CaptureConfig(reservoir_tokens=24, r2_tokens=16, massive_fraction=0.25, seed=3)


def folded(name: str) -> tuple[FusedModel, FusedModel]:
    """The norm-folded model, held and lazy."""
    tiny: Tiny = make_tiny(CONFIGS[name]())
    held, lazy = (
        fuse(tiny.state, tiny.wiring, tiny.rotations([]), dtype=torch.float32, lazy=each)
        for each in (False, True)
    )
    return held, lazy


@pytest.mark.parametrize("name", FAMILIES)
def test_final_hidden_states_and_logits_in_chunks_are_those_of_the_model(
    name: str, tmp_path: Path
) -> None:
    held, lazy = folded(name)
    model = materialize(held)
    flow = Flow(lazy, batches(), tmp_path, to_the_end=True, max_memory=0)
    flow.enter()
    for passage in flow.blocks():
        passage()
    with flow.head() as head:
        for batch, final in zip(batches(), flow.final(), strict=True):
            with torch.no_grad():
                body = model.base_model(input_ids=batch.input_ids).last_hidden_state
                expected = model(input_ids=batch.input_ids).logits.flatten(0, 1)
            assert torch.equal(final, body)
            chunks = torch.cat([head(some) for some in final.flatten(0, 1).split(5)])
            # a matmul of other rows may be summed in another order: a few ulp
            torch.testing.assert_close(chunks, expected, rtol=1e-5, atol=1e-5)
    flow.delete()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_streamed_capture_keeps_what_one_of_the_whole_model_keeps(
    name: str, tmp_path: Path
) -> None:
    held, lazy = folded(name)
    sizes = held.wiring.sizes
    whole = capture(
        materialize(held),
        held.wiring.capture_sites,
        batches(),
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        config=SMALL,
    )
    streamed = capture_blockwise(lazy, Flow(lazy, batches(), tmp_path), config=SMALL)
    assert streamed.provenance == whole.provenance
    assert fused_fingerprint(lazy) == whole.provenance.model
    # the one sum that has another order: of float64 products, over sites and batches
    torch.testing.assert_close(streamed.r1.covariance, whole.r1.covariance, rtol=1e-12, atol=1e-14)
    for kind, expected in (("whole", whole), ("streamed", streamed)):
        expected.save(tmp_path / kind)
    for file in ("r1.safetensors", "r2.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (
            tmp_path / "streamed" / file
        ).read_bytes()
    assert list(streamed.sites) == list(whole.sites)
    for site, found in streamed.sites.items():
        assert torch.equal(found.mean, whole.sites[site].mean)
        assert torch.equal(found.std, whole.sites[site].std)
    for layer, values in streamed.r2.items():
        assert torch.equal(values.covariance, whole.r2[layer].covariance)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prefix_is_computed_and_seen_block_by_block(name: str, tmp_path: Path) -> None:
    held, lazy = folded(name)
    expected = with_prefix(held, (5, 9), "why")
    found = with_prefix_blockwise(lazy, (5, 9), "why")
    assert found.prefix is not None
    assert expected.prefix is not None
    assert (found.prefix.tokens, found.prefix.reason) == ((5, 9), "why")
    for layer, keys in expected.prefix.keys.items():
        assert torch.equal(found.prefix.keys[layer], keys)
        assert torch.equal(found.prefix.values[layer], expected.prefix.values[layer])
    flow = Flow(found, batches(), tmp_path, to_the_end=True)
    flow.enter()
    for passage in flow.blocks():
        passage()
    model = materialize(expected)
    for batch, final in zip(batches(), flow.final(), strict=True):
        with torch.no_grad():
            body = model.base_model(input_ids=batch.input_ids).last_hidden_state
        assert torch.equal(final, body)


@pytest.mark.parametrize("tokens", [(), (5,)])
def test_massive_tokens_are_those_of_the_whole_model(tokens: tuple[int, ...]) -> None:
    held, lazy = folded("gpt2")
    rows = token_rows()
    model = materialize(with_prefix(held, tokens))
    expected = massive_inputs(model, held.wiring.linear_names, rows)
    assert massive_inputs_blockwise(lazy, tokens, rows) == expected
