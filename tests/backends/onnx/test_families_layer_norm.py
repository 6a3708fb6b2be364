"""Families with LayerNorm, but for OPT, become graphs that compute the torch reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.onnx.families import (
    LAYER_NORM,
    check_kept_norms,
    check_prefill_and_decoding,
    one_of,
    run_here,
)
from tests.backends.onnx.whole import compare, quantized
from tests.tiny import CONFIGS
from tests.tolerances import FLIPS, WEIGHT_ONLY


@pytest.mark.parametrize("name", run_here(LAYER_NORM))
def test_prefill_and_decoding_are_the_reference(name: str, tmp_path: Path) -> None:
    check_prefill_and_decoding(name, tmp_path)


@pytest.mark.parametrize("name", one_of(LAYER_NORM))
def test_kept_norms_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    check_kept_norms(name, tmp_path)


@pytest.mark.parametrize(
    ("scheme", "overrides"),
    [
        ("int8-weight-only", {"*.attn.c_attn": "float"}),
        ("int8", {"*.mlp.c_fc": "float"}),
        ("int4-weight-only", {"*.mlp.c_proj": "float"}),
        ("float", {}),
    ],
    ids=["c_attn", "c_fc", "c_proj", "all"],
)
def test_any_linear_of_gpt2_in_float_is_the_reference(
    scheme: str, overrides: dict[str, str], tmp_path: Path
) -> None:
    """They are transposed in checkpoints, and not square."""
    model = quantized(CONFIGS["gpt2"](), scheme=scheme, overrides=overrides)
    assert compare(model, tmp_path).error <= (FLIPS if scheme == "int8" else WEIGHT_ONLY)
