"""Llama and its nearest kin become graphs that compute the torch reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calib.network.skeleton import portable_config
from tests.backends.onnx.conftest import CASES
from tests.backends.onnx.families import (
    EXPERTS,
    LAYER_NORM,
    OPT,
    PACKED,
    POST_NORM,
    ROTARY,
    RUN_ELSEWHERE,
    check_kept_norms,
    check_prefill_and_decoding,
    one_of,
    run_here,
)
from tests.tiny import CONFIGS


def test_every_config_is_in_one_group() -> None:
    groups = [*ROTARY, *PACKED, *POST_NORM, *EXPERTS, *LAYER_NORM, *OPT]
    assert sorted(groups) == sorted(CONFIGS)


def test_the_others_are_run_elsewhere() -> None:
    configs = {
        json.dumps(portable_config(CONFIGS[name]()), sort_keys=True) for name in RUN_ELSEWHERE
    }
    assert configs <= {
        json.dumps(portable_config(case[0]()), sort_keys=True) for case in CASES.values()
    }


@pytest.mark.parametrize("name", run_here(ROTARY))
def test_prefill_and_decoding_are_the_reference(name: str, tmp_path: Path) -> None:
    check_prefill_and_decoding(name, tmp_path)


@pytest.mark.parametrize("name", one_of(ROTARY))
def test_kept_norms_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    check_kept_norms(name, tmp_path)
