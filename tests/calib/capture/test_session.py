"""Capture on a tiny Llama: equal to looking at every activation, whatever the batches, and strict
about failures.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from capture_support import ALL, HEAD_DIM, HEADS, HIDDEN, KV, LAYERS, SMALL, build_llama, run
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from calib.capture.collector import by_kv_head
from calib.capture.session import capture
from calib.capture.sites import CaptureConfig, CaptureSite, estimate_bytes
from calib.capture.storage import Capture
from calib.data.batches import Batch, length_batches
from calib.data.tokens import token_hash
from calib.errors import (
    CheckpointError,
    DataError,
    QuantizationError,
    RotqError,
    UnsupportedModelError,
)

# Two ways to batch the same rows, or to mask them, differ by the rounding of float32 matmuls
# through two layers: a few units of 2**-24 for each of about 20 operations, relative to the size of
# the activations.
FLOAT32 = 20 * 8 * 2.0**-24


def every_activation(
    model: nn.Module, sites: list[CaptureSite], rows: list[Tensor]
) -> dict[str, Tensor]:
    """The input of each site, [tokens, n], row by row: what is captured, the memory-hungry way."""
    found: dict[str, list[Tensor]] = {site.module: [] for site in sites}
    for site in sites:

        def keep(module: nn.Module, args: tuple[Any, ...], name: str = site.module) -> None:
            found[name].append(args[0][0].detach())

        model.get_submodule(site.module).register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in rows:
            model(row.unsqueeze(0))
    for site in sites:
        model.get_submodule(site.module)._forward_pre_hooks.clear()
    return {name: torch.cat(parts) for name, parts in found.items()}


def close(a: Tensor, b: Tensor, rtol: float = FLOAT32) -> bool:
    """Whether two tensors agree relative to the largest entry."""
    return bool((a.double() - b.double()).abs().max() <= rtol * b.abs().max())


def as_set(rows: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in rows.double().round(decimals=4).tolist()}


def test_equals_looking_at_every_activation(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor]
) -> None:
    seen = every_activation(llama, sites, rows)
    got = run(llama, sites, rows, ALL, batch_size=1)

    r1 = torch.cat([seen[site.module] for site in sites if site.rotation == "r1"]).double()
    assert got.r1.channels.count == len(r1) == 4 * sum(map(len, rows))
    assert close(got.r1.covariance, torch.cov(r1.T, correction=0))
    assert close(got.r1.second_moment, r1.T @ r1 / len(r1))
    assert close(got.r1.channels.mean, r1.mean(0))
    assert close(got.r1.channels.std, r1.std(0, correction=0))
    assert torch.equal(got.r1.channels.absmax, r1.abs().amax(0))
    assert as_set(got.r1.samples.values) == as_set(r1)
    assert list(got.sites) == [site.module for site in sites if site.rotation == "r1"]
    assert torch.equal(got.sites[sites[1].module].maximum, seen[sites[1].module].double().amax(0))

    assert got.r2_samples().shape == (LAYERS, KV, sum(map(len, rows)) * HEADS // KV, HEAD_DIM)
    for layer in range(LAYERS):
        x = seen[f"model.layers.{layer}.self_attn.o_proj"]
        heads = x.view(-1, HEADS, HEAD_DIM)
        for kv in range(KV):
            # two query heads per key/value head
            own = torch.cat([heads[:, 2 * kv], heads[:, 2 * kv + 1]]).double()
            assert as_set(got.r2_samples()[layer, kv]) == as_set(own)
            assert close(got.r2[layer].covariance[kv], torch.cov(own.T, correction=0))
            assert torch.equal(got.r2[layer].channels.minimum[kv], own.amin(0))
        assert got.r2[layer].samples.values.data_ptr() == got.r2_samples()[layer].data_ptr()


def test_by_kv_head_keeps_the_heads_of_a_token_together() -> None:
    x = torch.arange(2 * 4 * 3).view(2, 12)  # two tokens, four heads of width three
    assert by_kv_head(x, 2, 3).tolist() == [
        [[0, 1, 2], [3, 4, 5], [12, 13, 14], [15, 16, 17]],
        [[6, 7, 8], [9, 10, 11], [18, 19, 20], [21, 22, 23]],
    ]


def test_batch_size_and_order_change_nothing_but_rounding(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor]
) -> None:
    one = run(llama, sites, rows, batch_size=1)
    many = run(llama, sites, length_batches(rows, 3)[::-1])
    assert one.provenance == many.provenance
    assert one.provenance.data_sha256 == token_hash(rows)
    assert torch.equal(one.r1.samples.weights, many.r1.samples.weights)
    assert close(one.r1.samples.values, many.r1.samples.values)  # the same tokens in the same order
    assert close(one.r2_samples(), many.r2_samples())
    assert close(one.r1.covariance, many.r1.covariance)
    assert close(one.r2[1].covariance, many.r2[1].covariance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_enters_nothing(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor], side: str
) -> None:
    length = max(map(len, rows))
    padded = torch.full((len(rows), length), 63)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        padded[index, place], mask[index, place] = row, 1
    got = run(llama, sites, [Batch(padded, tuple(range(len(rows))), mask)])
    want = run(llama, sites, rows)
    assert got.provenance == want.provenance
    assert got.r1.channels.count == want.r1.channels.count
    assert close(got.r1.samples.values, want.r1.samples.values)
    for name in ("mean", "std", "minimum", "maximum"):
        assert close(getattr(got.r1.channels, name), getattr(want.r1.channels, name))
        assert close(getattr(got.r2[1].channels, name), getattr(want.r2[1].channels, name))
    assert close(got.r1.covariance, want.r1.covariance)
    assert close(got.r2_samples(), want.r2_samples())


def test_massive_tokens_are_kept(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor]
) -> None:
    r1 = [site for site in sites if site.rotation == "r1"]
    largest = (
        torch.cat(list(every_activation(llama, r1, rows).values())).abs().amax(1).topk(16).values
    )
    got = run(llama, r1, rows, batch_size=1).r1.samples
    assert got.massive == 16  # a quarter of 64
    assert torch.equal(got.values[:16].abs().amax(1).sort(descending=True).values, largest)
    torch.testing.assert_close(
        float(got.weights.sum()), float(4 * sum(map(len, rows))), rtol=1e-6, atol=0
    )


def test_same_seed_same_bytes_other_seed_other_tokens(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor], tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(llama, sites, rows, replace(SMALL, seed=seed)).save(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert (tmp_path / "a" / "r1.safetensors").read_bytes() != (
        tmp_path / "c" / "r1.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_module(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor], bad: float
) -> None:
    with torch.no_grad():
        llama.model.layers[1].input_layernorm.weight[3] = bad
    with pytest.raises(
        QuantizationError, match=r"'model\.layers\.1\.self_attn\.q_proj' holds NaN or Inf"
    ) as caught:
        run(llama, sites, rows)
    assert caught.value.hint is not None
    assert all(not module._forward_pre_hooks for module in llama.modules())


def test_hooks_go_and_modes_stay(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor]
) -> None:
    llama.train()
    llama.lm_head.eval()
    run(llama, sites, rows)
    assert all(not module._forward_pre_hooks for module in llama.modules())
    assert llama.model.layers[0].training
    assert not llama.lm_head.training


def test_sites_that_do_not_fit_are_refused(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor]
) -> None:
    def refused(
        site: CaptureSite, said: str, error: type[RotqError] = UnsupportedModelError
    ) -> None:
        with pytest.raises(error, match=said):
            run(llama, [sites[0], site], rows)

    refused(CaptureSite("model.layers.9.mlp", 9, "r1"), "no submodule '9'", CheckpointError)
    refused(CaptureSite("lm_head", 0, "r1"), r"never reached 1 .* lm_head", QuantizationError)
    refused(CaptureSite("model.layers.0.mlp.down_proj", 0, "r1"), "48 wide, other R1 sites are 32")
    refused(
        CaptureSite("model.layers.0.mlp.down_proj", 0, "r2"),
        "48 wide, which is no multiple of 2 key/value heads",
    )
    with pytest.raises(UnsupportedModelError, match="no R1 or R2 site"):
        capture(
            llama,
            [SimpleNamespace(module="x", layer=0, rotation="r4")],
            [],
            num_kv_heads=KV,
            head_dim=HEAD_DIM,
        )


class Odd(nn.Module):
    """A model that gives its layer one token of many, or no tensor at all."""

    def __init__(self, given: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.given = given
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool) -> None:
        self.layer(self.given)


def test_calls_without_one_vector_for_each_token_are_refused(rows: list[Tensor]) -> None:
    site = CaptureSite("layer", 0, "r1")
    with pytest.raises(UnsupportedModelError, match=r"'layer' sees a tensor \[1, 1, 4\]"):
        run(Odd(torch.zeros(1, 1, 4)), [site], rows)
    with pytest.raises(UnsupportedModelError, match="'layer' is called without a tensor"):
        run(Odd(None), [site], rows)


def test_no_batches_is_an_error(llama: LlamaForCausalLM, sites: list[CaptureSite]) -> None:
    with pytest.raises(DataError, match="no calibration batch"):
        capture(llama, sites, iter([]), num_kv_heads=KV, head_dim=HEAD_DIM)


def test_progress_counts_batches(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor]
) -> None:
    calls: list[tuple[str, int, int | None]] = []
    batches = length_batches(rows, 4)
    capture(
        llama,
        sites,
        batches,
        num_kv_heads=KV,
        head_dim=HEAD_DIM,
        config=SMALL,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("capture", done, len(batches)) for done in range(len(batches) + 1)]


def stored_bytes(got: Capture) -> int:
    """All tensors of a capture."""
    tensors = [got.r1.covariance, got.r1.samples.values, got.r1.samples.weights]
    tensors += [got.r2_samples(), got.stacked_r2().weights]
    tensors += [site.covariance for site in got.r2.values()]
    for channels in (
        got.r1.channels,
        *got.sites.values(),
        *(site.channels for site in got.r2.values()),
    ):
        tensors += [channels.mean, channels.std, channels.minimum, channels.maximum]
    return sum(tensor.nbytes for tensor in tensors)


def test_size_is_as_estimated_and_does_not_grow_with_the_data(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor], tmp_path: Path
) -> None:
    small, large = run(llama, sites, rows), run(llama, sites, rows * 10)
    assert large.r1.channels.count == 10 * small.r1.channels.count
    estimate = estimate_bytes(
        layers=LAYERS,
        hidden=HIDDEN,
        heads=HEADS,
        num_kv_heads=KV,
        head_dim=HEAD_DIM,
        config=SMALL,
        sample_bytes=4,
    )
    assert stored_bytes(large) == stored_bytes(small) == estimate.disk
    large.save(tmp_path / "capture")
    written = sum(file.stat().st_size for file in (tmp_path / "capture").iterdir())
    assert 0 <= written - estimate.disk < 16_384  # headers and the manifest


def test_llama_2_7b_fits_its_bounds() -> None:
    estimate = estimate_bytes(
        layers=32,
        hidden=4096,
        heads=32,
        num_kv_heads=32,
        head_dim=128,
        config=CaptureConfig(),
        sample_bytes=2,
    )
    assert estimate.memory <= 1e9
    assert estimate.disk <= 4e9


def test_settings_that_keep_nothing_are_refused() -> None:
    for change in (
        {"reservoir_tokens": 1},
        {"r2_tokens": 0},
        {"massive_fraction": 0.6},
        {"massive_fraction": -0.1},
    ):
        with pytest.raises(DataError, match="cannot capture"):
            CaptureConfig(**change)


def test_bfloat16_models_keep_bfloat16_samples(
    sites: list[CaptureSite], rows: list[Tensor]
) -> None:
    got = run(build_llama().to(torch.bfloat16), sites, rows)
    assert got.r1.samples.values.dtype == got.r2_samples().dtype == torch.bfloat16
    assert got.r1.covariance.dtype == torch.float64
