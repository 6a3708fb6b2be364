"""What a caller has set in torch for the whole process changes no byte of what rotq writes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import exporter
from calib.process.ambient import plain_torch
from exporter.recipe import Recipe, load_recipe
from tests.checkpoints import write_checkpoint
from tests.exporter.cli_support import ROOT

TINY_RUN = {
    "calibration.nsamples": 4,
    "calibration.seqlen": 32,
    "gate.nsamples": 2,
    "evaluation.nsamples": 2,
    "rotate": "r1,r2",
    "rotation.r1_tokens": 64,
    "rotation.r2_tokens": 32,
    "rotation.r1.epochs": 1,
    "rotation.r2.epochs": 1,
    "rotation.r1.optimizer": "qr",
    "rotation.r2.optimizer": "qr",
    "rotation.select": False,
    "weights.algorithm": "adaround:iterations=2",
    "prefix": "none",
    "device": "cpu",
    "backend": "safetensors",
    "target": "tensorrt",
}


@contextmanager
def _default_dtype() -> Any:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _no_context() -> Any:
    yield


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default dtype": _default_dtype,
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _exported(folder, tmp_path_factory.mktemp("plain") / "out", _no_context)


def _recipe(**changes: Any) -> Recipe:
    return load_recipe(None, {**TINY_RUN, **changes})


def _exported(
    model: Any, output: Path, state: Callable[[], AbstractContextManager[Any]]
) -> dict[str, str]:
    with state():
        result = exporter.export(model, _recipe(), output=output, verify=False)
    files = result.output.glob("*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_run_writes_the_same_bytes(
    folder: Path,
    plain: dict[str, str],
    state: Callable[[], AbstractContextManager[Any]],
    tmp_path: Path,
) -> None:
    assert plain
    assert _exported(folder, tmp_path / "out", state) == plain


def test_a_model_loaded_in_inference_mode(
    folder: Path, plain: dict[str, str], tmp_path: Path
) -> None:
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    written = _exported(model, tmp_path / "out", torch.inference_mode)
    assert written.keys() == plain.keys()


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_everything_is_as_it_was_afterwards(
    state: Callable[[], AbstractContextManager[Any]],
) -> None:
    def now() -> tuple[Any, ...]:
        return (
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_autocast_enabled("cpu"),
            torch.get_float32_matmul_precision(),
        )

    fresh = now()
    with state():
        before = now()
        with plain_torch():
            assert now() == fresh
        assert now() == before
    assert now() == fresh


PRECISIONS = {
    "older": "torch.set_float32_matmul_precision('high')",
    "newer": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "newer, everywhere": "torch.backends.fp32_precision = 'tf32'",
    "both": (
        "torch.set_float32_matmul_precision('high');"
        " torch.backends.cuda.matmul.fp32_precision = 'ieee'"
    ),
}
"""Ways to say how products of float32 are computed. A process that has used two of them cannot go
back."""


@pytest.mark.parametrize("setting", PRECISIONS.values(), ids=PRECISIONS)
def test_products_are_exact_by_whatever_way_they_were_not(setting: str) -> None:
    program = f"""
import torch
from calib.process.ambient import plain_torch

def now():
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "unreadable"
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return older, *(backend.fp32_precision for backend in backends)

{setting}
before = now()
with plain_torch():
    assert now() == ("highest", "ieee", "ieee"), now()
assert now() == before, (before, now())
"""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
