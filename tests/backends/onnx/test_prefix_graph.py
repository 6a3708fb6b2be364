"""A prefix in a graph: the inputs and outputs of a graph without one, and the logits of torch with
one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.runner import OnnxModel
from calib.artifact import QuantizedModel
from calib.fusing import with_prefix
from calib.measure.reference import build_reference
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, quantize_fused, relative_l2, token_rows
from tests.tolerances import SAME_SUMS

TOKENS = (5, 7, 11)
FAMILIES = ("llama", "qwen2", "smollm3", "gpt2", "opt", "gpt_neox", "gemma2", "mistral", "mixtral")


def quantized(name: str, scheme: str = "int8-weight-only") -> QuantizedModel:
    kinds = ("r1", "r2", "r3", "r4")
    fused = fuse_tiny(make_tiny(CONFIGS[name]()), kinds)
    return quantize_fused(with_prefix(fused, TOKENS), scheme)


def written(model: QuantizedModel, folder: Path, target: str = "ort", **options: str) -> OnnxModel:
    folder.mkdir()
    OnnxBackend().write(model, folder, WriteOptions(target, **options))  # type: ignore[arg-type]
    loaded = OnnxBackend().load(folder, target, exact=True)
    assert isinstance(loaded, OnnxModel)
    return loaded


def expected(model: QuantizedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = build_reference(model)(input_ids=ids, use_cache=False).logits
    return logits


def stepped(graph: OnnxModel, ids: Tensor, chunks: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Logits of ``ids [B, T]`` in chunks of these lengths, and the last cache."""
    found, past, start = [], None, 0
    for chunk in chunks:
        stop = start + chunk
        mask = torch.ones(len(ids), stop, dtype=torch.long)
        positions = torch.arange(start, stop).expand(len(ids), chunk)
        logits, past = graph.forward(ids[:, start:stop], mask, positions, past)
        found.append(logits)
        start = stop
    assert past is not None
    return torch.cat(found, dim=1), past


@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_what_torch_computes(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    graph = written(model, tmp_path / "graph")
    ids = torch.stack(token_rows((12, 12), seed=3))
    reference = expected(model, ids)
    for chunks in ((12,), (4, 1, 1, 6)):
        logits, past = stepped(graph, ids, chunks)
        assert relative_l2(logits, reference) <= SAME_SUMS
        assert past[0].shape[2] == ids.shape[1]  # the text alone


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_in_one_buffer(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    graph = written(model, tmp_path / "graph", kv_buffer="shared")
    ids = torch.stack(token_rows((9, 9), seed=3))
    logits, _ = stepped(graph, ids, (5, 1, 1, 2))
    assert relative_l2(logits, expected(model, ids)) <= SAME_SUMS


def test_rows_of_different_lengths(tmp_path: Path) -> None:
    model = quantized("llama")
    graph = written(model, tmp_path / "graph")
    row, padding = torch.stack(token_rows((9,), seed=3)), 4
    ids = torch.cat([torch.nn.functional.pad(row, (padding, 0)), torch.ones(1, 13, dtype=int)])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    logits, _ = graph.forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    assert relative_l2(logits[:1, padding:], expected(model, row)) <= SAME_SUMS


def test_the_logits_of_the_last_token(tmp_path: Path) -> None:
    model = quantized("llama")
    graph = written(model, tmp_path / "graph", logits="last")
    ids = torch.stack(token_rows((9, 9), seed=3))
    logits, _ = stepped(graph, ids, (9,))
    assert logits.shape[1] == 1
    assert relative_l2(logits, expected(model, ids)[:, -1:]) <= SAME_SUMS


def test_in_float16_for_tensorrt(tmp_path: Path) -> None:
    """Which runs in ONNX Runtime here: to the precision of float16, and far from no prefix."""
    from dataclasses import replace

    from calib.artifact import cast_model

    model = quantized("llama")
    graph = written(cast_model(model, torch.float16), tmp_path / "graph", "tensorrt")
    ids = torch.stack(token_rows((9, 9), seed=3))
    logits, _ = stepped(graph, ids, (9,))
    lost = relative_l2(logits, expected(model, ids))
    assert lost <= 2e-2  # 2^-11 a value, a few hundred roundings
    assert relative_l2(logits, expected(replace(model, prefix=None), ids)) > 5 * lost
