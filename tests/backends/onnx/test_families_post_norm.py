"""Families with norms behind linears become graphs that compute the torch reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.onnx.families import (
    POST_NORM,
    check_kept_norms,
    check_prefill_and_decoding,
    one_of,
    run_here,
)


@pytest.mark.parametrize("name", run_here(POST_NORM))
def test_prefill_and_decoding_are_the_reference(name: str, tmp_path: Path) -> None:
    check_prefill_and_decoding(name, tmp_path)


@pytest.mark.parametrize("name", one_of(POST_NORM))
def test_kept_norms_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    check_kept_norms(name, tmp_path)
