"""Families with experts become graphs that compute the torch reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.onnx.experts import ACTIVATIONS
from backends.onnx.refusals import graph_refusal
from calib.network.skeleton import portable_config
from tests.backends.onnx.families import (
    EXPERTS,
    check_kept_norms,
    check_prefill_and_decoding,
    one_of,
    run_here,
)
from tests.tiny import CONFIGS


@pytest.mark.parametrize("name", run_here(EXPERTS))
def test_prefill_and_decoding_are_the_reference(name: str, tmp_path: Path) -> None:
    check_prefill_and_decoding(name, tmp_path)


@pytest.mark.parametrize("name", one_of(EXPERTS))
def test_kept_norms_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    check_kept_norms(name, tmp_path)


def test_experts_with_an_unknown_activation_are_refused_with_what_is_known() -> None:
    config = portable_config(CONFIGS["mixtral"]())
    assert graph_refusal(config, {}) is None
    refusal = graph_refusal(config | {"hidden_act": "mish"}, {})
    assert refusal is not None
    assert "'mish'" in refusal.reason
    assert all(name in refusal.hint for name in ACTIVATIONS)
    assert graph_refusal(portable_config(CONFIGS["llama"]()) | {"hidden_act": "mish"}, {}) is None
