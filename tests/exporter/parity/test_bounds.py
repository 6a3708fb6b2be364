"""Where the bound on the divergence from the original comes from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from calib.artifact import QuantizedModel
from calib.fusing import with_prefix
from exporter.parity.bounds import KL_FACTOR, KL_LEAST, kl_bound
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, quantize_fused


def model(*gate: dict[str, Any], prefix: tuple[int, ...] = ()) -> QuantizedModel:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()))
    quantized = quantize_fused(with_prefix(fused, prefix) if prefix else fused, "int8")
    return replace(quantized, provenance=replace(quantized.provenance, gate=gate))


CHOSEN = {"rotate": "r1", "kl": 0.004, "chosen": True}
LOG = math.log(1.02)  # of int8's bound on perplexity


def test_the_gate_measured_what_is_chosen() -> None:
    bound, note = kl_bound(model({"rotate": "none", "kl": 0.001}, CHOSEN))
    assert bound == pytest.approx(KL_FACTOR * 0.004 + KL_LEAST)
    assert "0.004" in note


@pytest.mark.parametrize("gate", [(), ({**CHOSEN, "kl": 0.4},), ({**CHOSEN, "kl": None},)])
def test_the_scheme_says_it_where_no_gate_did_or_it_was_far(
    gate: tuple[dict[str, Any], ...],
) -> None:
    assert kl_bound(model(*gate))[0] == pytest.approx(KL_FACTOR * LOG + KL_LEAST)


def test_a_text_of_its_own_is_not_that_of_the_gate() -> None:
    quantized = model(CHOSEN)
    recipe = {**quantized.provenance.recipe, "evaluation": {"dataset": "other.txt"}}
    other = replace(quantized, provenance=replace(quantized.provenance, recipe=recipe))
    assert kl_bound(other)[0] == pytest.approx(KL_FACTOR * LOG + KL_LEAST)


def test_a_prefix_makes_another_model() -> None:
    bound, note = kl_bound(model(prefix=(5,)))
    assert bound is None
    assert "prefix" in note
    assert kl_bound(model({**CHOSEN, "kl": 0.03}, prefix=(5,)))[0] == pytest.approx(
        KL_FACTOR * 0.03 + KL_LEAST
    )
