"""A prefix gives what running its tokens in front of the text gives, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.artifact import Prefix, load_artifact, load_prefix, save_artifact, save_prefix
from calib.artifact.prefix import PREFIX_MANIFEST, PREFIX_TENSORS
from calib.errors import CheckpointError, QuantizationError
from calib.fusing import FusedModel, materialize, with_prefix
from calib.measure.reference import build_reference
from calib.network.prefix import attach_prefix, compute_prefix
from tests.sealing import edit_sealed
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, quantize_fused, relative_l2, token_rows
from tests.tolerances import SAME_SUMS

TOKENS = (5, 7, 11)
FAMILIES = [name for name in CONFIGS if name not in ("mistral", "gemma2", "gemma3")]
"""Those whose windows are longer than a row: in the others the prefix is seen where tokens of the
text would have left the window.
"""


def fused_of(name: str) -> FusedModel:
    return fuse_tiny(make_tiny(CONFIGS[name]()), ["r1", "r2", "r3", "r4"])


def rows(count: int = 2, length: int = 9) -> Tensor:
    return torch.stack(token_rows((length,) * count, seed=3))


def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return found


def in_front(ids: Tensor) -> Tensor:
    return torch.cat([torch.tensor([TOKENS]).expand(len(ids), -1), ids], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_as_if_its_tokens_stood_in_front(name: str) -> None:
    fused = fused_of(name)
    ids = rows()
    expected = logits(materialize(fused), in_front(ids))[:, len(TOKENS) :]
    found = logits(materialize(with_prefix(fused, TOKENS)), ids)
    assert relative_l2(found, expected) <= SAME_SUMS
    without = logits(materialize(fused), ids)
    assert relative_l2(without, expected) > 100 * SAME_SUMS  # so it is the prefix that did it


def test_token_by_token_from_a_cache_that_holds_the_text_alone() -> None:
    fused = with_prefix(fused_of("llama"), TOKENS)
    model, ids = materialize(fused), rows()
    expected = logits(model, ids)
    steps, cache = [], None
    with torch.no_grad():
        for start, stop in ((0, 4), *((t, t + 1) for t in range(4, ids.shape[1]))):
            output = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            steps.append(output.logits)
            cache = output.past_key_values
    assert relative_l2(torch.cat(steps, dim=1), expected) <= SAME_SUMS
    assert cache is not None
    assert cache.get_seq_length() == ids.shape[1]


def test_padding_on_the_left_changes_nothing() -> None:
    model = materialize(with_prefix(fused_of("llama"), TOKENS))
    row, padding = rows(1), 3
    padded = torch.nn.functional.pad(row, (padding, 0))
    mask = torch.nn.functional.pad(torch.ones_like(row), (padding, 0))
    found = logits(model, padded, attention_mask=mask)[:, padding:]
    assert relative_l2(found, logits(model, row)) <= SAME_SUMS


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_a_window_that_has_moved_on_still_sees_it(name: str) -> None:
    """The last token differs with the prefix, although the window has left the row's first."""
    fused = fused_of(name)
    ids = rows(1, 24)
    window = int(fused.config.sliding_window)
    assert window < ids.shape[1]
    one, other = (
        logits(materialize(with_prefix(fused, tokens)), ids)[:, -1] for tokens in ((5,), (6,))
    )
    assert relative_l2(one, other) > 100 * SAME_SUMS


def test_the_body_alone_sees_it_as_the_whole_model_does() -> None:
    """Capturing and calibrating leave the head out."""
    fused = with_prefix(fused_of("llama"), TOKENS)
    model: Any = materialize(fused)
    ids = rows()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
        assert torch.equal(model.lm_head(hidden), logits(model, ids))


def test_a_quantized_cache_leaves_it_in_float() -> None:
    """A cache that rounds all it holds to zero leaves attention with the prefix alone."""
    from calib.artifact import QuantizedCache
    from calib.schemes import KV_SCHEMES

    fused = with_prefix(fused_of("llama"), TOKENS)
    quantized = quantize_fused(fused, "int8-weight-only")
    scale = {layer: torch.tensor(1e9) for layer in fused.wiring.layers}
    nothing = replace(quantized, cache=QuantizedCache(KV_SCHEMES["int8"], scale, scale))
    assert fused.prefix is not None
    moved = Prefix(TOKENS, fused.prefix.keys, {i: 2 * v for i, v in fused.prefix.values.items()})
    one = logits(build_reference(nothing), rows())
    other = logits(build_reference(replace(nothing, prefix=moved)), rows())
    assert torch.isfinite(one).all()
    assert relative_l2(one, other) > 100 * SAME_SUMS


def test_the_artifact_keeps_it(tmp_path: Path) -> None:
    quantized = quantize_fused(with_prefix(fused_of("qwen2"), TOKENS, "because"), "int8")
    save_artifact(quantized, tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.prefix is not None
    assert (loaded.prefix.tokens, loaded.prefix.reason) == (TOKENS, "because")
    ids = rows()
    same = logits(build_reference(loaded), ids), logits(build_reference(quantized), ids)
    assert torch.equal(*same)


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    prefix = with_prefix(fused_of("llama"), TOKENS).prefix
    assert prefix is not None
    assert load_prefix(tmp_path) is None
    save_prefix(prefix, tmp_path)
    (tmp_path / PREFIX_TENSORS).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load_prefix(tmp_path)
    save_prefix(prefix, tmp_path)
    text = (tmp_path / PREFIX_MANIFEST).read_text(encoding="utf-8")
    (tmp_path / PREFIX_MANIFEST).write_text(text.replace("    11\n", "    11,\n    12\n"))
    with pytest.raises(CheckpointError, match="its checksum does not fit"):
        load_prefix(tmp_path)
    save_prefix(prefix, tmp_path)
    edit_sealed(tmp_path / PREFIX_MANIFEST, lambda manifest: manifest["tokens"].append(12))
    with pytest.raises(CheckpointError, match="not of its tokens"):
        load_prefix(tmp_path)


@pytest.mark.parametrize("tokens", [(), (5, -1), (10_000,)])
def test_tokens_that_do_not_fit_are_refused(tokens: tuple[int, ...]) -> None:
    fused = fused_of("llama")
    with pytest.raises(QuantizationError, match="does not fit a vocabulary"):
        compute_prefix(materialize(fused), fused.wiring, tokens)


def test_a_second_one_is_refused() -> None:
    fused = with_prefix(fused_of("llama"), TOKENS)
    assert fused.prefix is not None
    with pytest.raises(QuantizationError, match="already"):
        attach_prefix(materialize(fused), fused.wiring, fused.prefix)
