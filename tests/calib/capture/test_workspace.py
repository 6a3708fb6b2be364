"""The workspace: chunks leave activations alone, and updates allocate nothing of an activation's
size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_support import HEAD_DIM, KV, SMALL
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from calib.capture.collector import Collector
from calib.capture.sites import CHUNK_TOKENS, CaptureConfig, CaptureSite
from calib.capture.workspace import Workspace
from calib.data.batches import Batch

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_buffers_are_used_again_and_grow() -> None:
    workspace = Workspace()
    first = workspace.take("a", (4, 5), torch.float32, CPU)
    assert workspace.take("a", (2, 10), torch.float32, CPU).data_ptr() == first.data_ptr()
    assert workspace.take("a", (3,), torch.float32, CPU).shape == (3,)
    assert workspace.take("b", (4, 5), torch.float32, CPU).data_ptr() != first.data_ptr()
    assert workspace.take("a", (4, 5), torch.float64, CPU).dtype == torch.float64
    assert workspace.take("a", (100,), torch.float32, CPU).shape == (100,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_chunk_describes_the_tokens_and_leaves_them_as_they_are(dtype: torch.dtype) -> None:
    x = (normal(50, 3, 2, 4) + 7.0).to(dtype).transpose(0, 1)  # 3 groups, 50 tokens of 2 vectors
    before = x.clone()
    chunk = Workspace().chunk(x)
    assert torch.equal(x, before)
    tokens = before.double().reshape(3, 100, 4)
    assert chunk.count == 100
    # The deviations are rounded once, by 2**-24 of values up to 12 (the mean's rounding is part of
    # `mean`, exactly).
    deviations = tokens - tokens.mean(1, keepdim=True)
    assert (chunk.centred.double() - deviations).abs().max() <= 2 * 12 * 2.0**-24
    assert (chunk.mean - tokens.mean(1)).abs().max() <= 12 * 2.0**-24
    torch.testing.assert_close(
        chunk.squares.double(), deviations.square().sum(1), rtol=100 * 2.0**-24, atol=0
    )
    assert torch.equal(chunk.minimum.double(), tokens.amin(1))
    assert torch.equal(chunk.maximum.double(), tokens.amax(1))


class LargestNew(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of one storage that an operator returned and that none of its arguments
    had.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata
            for leaf in pytree.tree_leaves((args, kwargs))
            if _is_tensor(leaf)
        }
        for leaf in pytree.tree_leaves(result):
            if _is_tensor(leaf) and leaf.untyped_storage()._cdata not in given:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def test_once_warm_an_update_allocates_no_copy_of_an_activation() -> None:
    """Whatever the batch: here one of three chunks, in which every activation has the size of the
    first.
    """
    sites = [CaptureSite("a", 0, "r1"), CaptureSite("b", 0, "r2")]
    width, tokens = KV * HEAD_DIM * 8, 3 * CHUNK_TOKENS
    collector = Collector(SMALL, sites, KV, HEAD_DIM)
    x = normal(1, tokens, width)
    largest = []
    for row in range(2):
        collector.begin(Batch(torch.zeros(1, tokens, dtype=torch.int64), (row,)))
        with LargestNew() as new:
            for site in sites:
                collector.observe(site, x)
        largest.append(new.bytes)
    chunk = 4 * CHUNK_TOKENS * width
    assert largest[0] >= chunk  # the buffers: this test sees them
    assert largest[1] < chunk / 8  # a few tokens for the reservoirs, and vectors


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("capacity", [8, 64])
def test_samples_are_regrouped_in_place(kv_heads: int, capacity: int) -> None:
    """Layer by layer in one store, whether it is full or the samples have to move together."""
    layers, tokens, head_dim, group = 3, 20, 4, 2
    sites = [CaptureSite(f"layer{layer}", layer, "r2") for layer in (5, 1, 3)]
    collector = Collector(
        CaptureConfig(8, capacity, massive_fraction=0.25), sites, kv_heads, head_dim
    )
    collector.begin(Batch(torch.arange(tokens).unsqueeze(0), (0,)))
    given = {
        site.layer: normal(tokens, kv_heads * group * head_dim, seed=site.layer) for site in sites
    }
    for site in sites:
        collector.observe(site, given[site.layer].unsqueeze(0))
    capture = collector.finish("model")
    kept = min(capacity, tokens)
    assert list(capture.r2) == [1, 3, 5]
    assert capture.r2_samples().shape == (layers, kv_heads, kept * group, head_dim)
    assert capture.r2_samples().is_contiguous()
    for index, layer in enumerate((1, 3, 5)):
        heads = given[layer].view(tokens, kv_heads, group, head_dim)
        values = capture.r2_samples()[index].unflatten(1, (kept, group))  # [kv, S, group, d]
        found = {tuple(token.flatten().tolist()) for token in values.transpose(0, 1)}
        assert len(found) == kept
        assert found <= {tuple(token.flatten().tolist()) for token in heads}
