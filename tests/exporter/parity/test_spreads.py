"""What rung 1 shows beside its figure: facts that hold whatever the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.artifact import QuantizedModel
from calib.fusing import materialize
from exporter.parity import fold, spreads
from exporter.parity.spreads import BINS, CHANNELS, evidence_of
from exporter.parity.subject import Subject
from exporter.reporting.evidence import Evidence
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, quantize_fused, token_rows

ROWS = token_rows((24, 24))


def found(
    family: str, scheme: str = "int8", rotate: tuple[str, ...] = ("r1", "r2", "r4")
) -> tuple[Evidence, QuantizedModel, torch.nn.Module]:
    tiny = make_tiny(CONFIGS[family]())
    fused = fuse_tiny(tiny, rotate)
    quantized = quantize_fused(fused, scheme)
    rotated = materialize(fused)
    subject = Subject(
        quantized, backend=None, target="", folder=Path(), rows=ROWS, source=None, fused=fused
    )  # type: ignore[arg-type]
    return evidence_of(subject, tiny.model(torch.float32), rotated, ROWS), quantized, rotated


def seen(model: torch.nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Input and output of a linear over all rows."""
    kept: list[tuple[Tensor, Tensor]] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, args, out: kept.append((args[0], out)))
    with torch.no_grad():
        for row in ROWS:
            model(row.unsqueeze(0))
    handle.remove()
    return (
        torch.cat([x.flatten(0, -2) for x, _ in kept]),
        torch.cat([y.flatten(0, -2) for _, y in kept]),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_spread_is_that_of_what_enters(family: str) -> None:
    evidence, _, rotated = found(family)
    assert evidence.inputs
    for row in evidence.inputs:
        x = seen(rotated, row.name)[0].float().abs()
        assert row.rotated.absmax == pytest.approx(float(x.max()), rel=1e-6)
        assert row.rotated.rms == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-6)
        tokens, channels = x.amax(1), x.amax(0)
        assert row.rotated.token_ratio == pytest.approx(
            float(tokens.max() / tokens.median()), rel=1e-5
        )
        assert row.rotated.channel_ratio == pytest.approx(
            float(channels.max() / channels.median()), rel=1e-5
        )
        if row.rotated.histogram:
            assert len(row.rotated.histogram) == BINS
            assert sum(row.rotated.histogram) == x.numel()
            assert max(row.rotated.channels) == pytest.approx(float(x.max()), rel=1e-3)


def test_of_every_kind_one_input_is_kept_whole() -> None:
    evidence, _, _ = found("llama")
    kinds = {row.kind for row in evidence.inputs}
    assert {"self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"} <= kinds
    # k, v and up read what q and gate read
    assert "self_attn.k_proj" not in kinds
    whole = [row for row in evidence.inputs if row.rotated.histogram]
    assert sorted(row.kind for row in whole) == sorted(kinds)
    for row in whole:
        rivals = [each for each in evidence.inputs if each.kind == row.kind and each.original]
        assert row.original is not None
        assert row.original.token_ratio == max(
            each.original.token_ratio for each in rivals if each.original is not None
        )


def test_a_rotation_of_the_values_keeps_their_power() -> None:
    """R2 and R4 are orthogonal: what enters the output and the down projection has the norm that
    it had, whatever channels it is in.
    """
    evidence, _, _ = found("llama")
    rows = [row for row in evidence.inputs if row.kind in ("self_attn.o_proj", "mlp.down_proj")]
    assert rows
    for row in rows:
        assert row.original is not None
        # 1e-5: float32, through two different orders of summation
        assert row.rotated.rms == pytest.approx(row.original.rms, rel=1e-5)
        assert row.rotated.absmax != row.original.absmax


@pytest.mark.parametrize("scheme", ["int8", "int4-weight-only"])
def test_noise_is_what_the_quantized_linear_makes_of_the_same_input(scheme: str) -> None:
    evidence, quantized, rotated = found("llama", scheme)
    assert {row.name for row in evidence.noise} == set(quantized.linears)
    for row in evidence.noise:
        linear = quantized.linears[row.name]
        x, expected = (each.double() for each in seen(rotated, row.name))
        if linear.input_scale is not None:
            scale = linear.input_scale.double()
            x = (x / scale).round().clamp(-127, 127) * scale
        given = x @ linear.values().double().T
        noise = float((given - expected).norm() / expected.norm())
        # a value on the edge of two codes may fall to either side in float32
        assert row.noise == pytest.approx(noise, rel=2e-2)
        assert row.noise > 0


def test_only_so_many_tokens_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreads, "TOKENS", 30)
    evidence, _, rotated = found("llama")
    for row in evidence.inputs:
        if row.rotated.histogram:
            width = seen(rotated, row.name)[0].shape[-1]
            assert sum(row.rotated.histogram) == 30 * width


def test_neighbouring_channels_are_kept_together_where_there_are_many() -> None:
    look, x = spreads._Seen(), torch.randn(1, 7, 3 * CHANNELS + 1)
    look.look(x)
    kept = look.spread(whole=True).channels
    assert len(kept) <= CHANNELS
    assert kept[0] == pytest.approx(float(x[..., :4].abs().max()), rel=1e-3)


def test_dead_inputs_have_figures_that_json_can_hold() -> None:
    look = spreads._Seen()
    look.look(torch.zeros(1, 5, 4))
    spread = look.spread(whole=True)
    assert (spread.absmax, spread.rms, spread.token_ratio) == (0.0, 0.0, 0.0)
    half = spreads._Seen()
    half.look(torch.tensor([[[0.0, 0.0, 0.0, 1e30]]]))
    assert half.spread(whole=False).channel_ratio < float("inf")


def test_a_model_that_cannot_be_looked_at_is_judged_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: object) -> Evidence:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(fold, "evidence_of", broken)
    subject: Any = SimpleNamespace(proof_rows=ROWS)
    assert fold._seen_beside(subject, torch.nn.Identity(), torch.nn.Identity()) is None
    assert "shapes do not fit" in caplog.text
