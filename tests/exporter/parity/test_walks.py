"""Models that are compared by walks, a block at a time, against the same ones whole in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from backends.onnx.backend import OnnxBackend
from calib.fusing import fuse, with_prefix
from calib.layerwise.prefix import with_prefix_blockwise
from calib.layerwise.smoothed import fold_all_lazily
from calib.measure.perplexity import model_logits
from calib.measure.reference import ReferenceLinear, build_reference
from calib.network.checkpoint import Checkpoint
from calib.quantizing.plan import resolve
from calib.schemes import scheme_named
from calib.smoothing.groups import groups_of
from calib.smoothing.methods import smoothing_named
from calib.smoothing.smooth import fold_all
from exporter.parity import fold
from exporter.parity.subject import Subject
from exporter.parity.walks import WALKED, original_logits
from exporter.recipe import load_recipe
from exporter.source import Source, open_source
from tests.checkpoints import write_checkpoint
from tests.tiny import CONFIGS, Tiny, make_tiny, quantize_fused, token_rows

KINDS: list[Any] = ["r1", "r2", "r4"]
LENGTHS = (24, 30, 24)
ORDER = 1e-4
"""Of a figure of rung 1 in itself: products of other shapes are summed in another order."""


def subjects(
    name: str, dtype: torch.dtype, prefix: tuple[int, ...] = (), scheme: str = "int8"
) -> tuple[Subject, Subject]:
    """One export, of a model that is held, and of one whose tensors are computed on access."""
    tiny: Tiny = make_tiny(CONFIGS[name]())
    model = tiny.model(torch.float32)
    checkpoint = Checkpoint.from_module(model)
    source = Source(name, tiny.wiring, checkpoint, cast(Any, None), {}, model)
    rotations = tiny.rotations([kind for kind in KINDS if kind in tiny.offered()])
    held, lazy = (
        fuse(checkpoint, tiny.wiring, rotations, dtype=dtype, lazy=each) for each in (False, True)
    )
    held, lazy = with_prefix(held, prefix), with_prefix_blockwise(lazy, prefix)
    quantized = quantize_fused(held, scheme)
    recipe = {**quantized.provenance.recipe, "layerwise": {"enabled": True}}
    by_blocks = replace(quantized, provenance=replace(quantized.provenance, recipe=recipe))
    rows = token_rows(LENGTHS, seed=5)
    backend = OnnxBackend()
    return (
        Subject(quantized, backend, "ort", Path(), rows, source, held),
        Subject(by_blocks, backend, "ort", Path(), rows, source, lazy),
    )


@pytest.mark.parametrize(
    ("name", "dtype", "prefix"),
    [
        ("llama", torch.float32, (5, 9)),
        ("gpt2", torch.bfloat16, ()),
        ("mixtral", torch.bfloat16, ()),
    ],
    ids=str,
)
def test_rung_1_by_walks_is_that_of_whole_models(
    name: str, dtype: torch.dtype, prefix: tuple[int, ...]
) -> None:
    whole, walked = (fold.fold_rows(subject) for subject in subjects(name, dtype, prefix))
    assert [row.name for row in walked] == [row.name for row in whole]
    assert [WALKED in row.note for row in walked if row.name.startswith("original")] == [True]
    for found, expected in zip(walked, whole, strict=True):
        assert WALKED not in expected.note
        assert found.passed == expected.passed
        assert found.measured is not None
        assert expected.measured is not None
        # what is left of float32 after the fold is itself a matter of the order of sums
        rtol = 1.0 if found.rung == 1 and dtype is torch.float32 else ORDER
        assert found.measured == pytest.approx(expected.measured, rel=rtol, abs=1e-9)


def test_a_wrong_fold_is_seen_by_walks() -> None:
    _, subject = subjects("llama", torch.float32)
    assert subject.fused is not None
    weight = "model.layers.1.mlp.down_proj.weight"
    wrong = {**subject.fused.state, weight: subject.fused.state[weight] * 1.001}
    rows = fold.fold_rows(replace(subject, fused=replace(subject.fused, state=wrong)))
    assert [row.passed for row in rows if row.name.startswith("original float")] == [False]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_original_is_walked_to_its_logits(name: str) -> None:
    _, subject = subjects(name, torch.float32)
    assert subject.source is not None
    expected = model_logits(subject.source.original("cpu"))
    with original_logits(subject, subject.rows) as logits:
        for row in (subject.rows[1], subject.rows[0][:-1]):
            ids = row.unsqueeze(0)
            # a row's beginning is looked up, and summed with the rest of the row
            torch.testing.assert_close(logits(ids), expected(ids), rtol=1e-4, atol=1e-5)


def test_the_walk_reads_a_folder_of_experts_as_transformers_does(tmp_path: Path) -> None:
    """Names, order and stacking of experts are rotq's own in a walk."""
    folder = write_checkpoint(tmp_path / "model", CONFIGS["mixtral"]())
    source = open_source(load_recipe(None, {"model": str(folder)}))
    _, subject = subjects("mixtral", torch.float32)
    subject = replace(subject, source=source)
    expected, ids = model_logits(source.original("cpu")), subject.rows[1].unsqueeze(0)
    with original_logits(subject, subject.rows) as logits:
        torch.testing.assert_close(logits(ids), expected(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_reference_that_keeps_no_weights_computes_the_same(name: str) -> None:
    whole, walked = subjects(name, torch.float32)
    held, lazy = build_reference(whole.quantized), build_reference(walked.quantized)
    ids = whole.rows[0].unsqueeze(0)
    assert torch.equal(model_logits(lazy)(ids), model_logits(held)(ids))
    linears = [module for module in lazy.modules() if isinstance(module, ReferenceLinear)]
    assert linears
    assert all(not list(linear.buffers()) + list(linear.parameters()) for linear in linears)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scales_are_folded_on_access_as_all_at_once(name: str) -> None:
    whole, walked = subjects(name, torch.float32)
    held, lazy = whole.fused, walked.fused
    assert held is not None
    assert lazy is not None
    method = smoothing_named("smoothquant:0.5")
    assert method is not None
    linears = resolve(scheme_named("int8"), held.wiring).linears
    generator = torch.Generator().manual_seed(0)
    scales: dict[str, Tensor] = {
        group.name: torch.rand(group.width, generator=generator, dtype=torch.float64) + 0.5
        for group in groups_of(held.wiring, held.rotations, linears)
    }
    assert scales
    found, expected = fold_all_lazily(lazy, scales), fold_all(held, scales)
    assert found.smoothing.keys() == expected.smoothing.keys()
    for key, tensor in expected.state.items():
        assert torch.equal(found.state[key], tensor), key
