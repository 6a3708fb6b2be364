"""Tripy: the real one where it is installed whole, else its real front end over stand-ins."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.safetensors.tripy import interpreter, stand_ins

Run = Callable[[Any, Tensor], Tensor]


@pytest.fixture(scope="session")
def compiles() -> bool:
    """Whether Tripy can compile here."""
    return torch.cuda.is_available() and importlib.util.find_spec("mlir_tensorrt") is not None


@pytest.fixture(scope="module")
def tp(compiles: bool) -> Iterator[Any]:
    """``nvtripy``."""
    if importlib.util.find_spec("nvtripy") is None:
        pytest.skip("nvtripy is not installed")
    if compiles:
        yield pytest.importorskip("nvtripy")
        return
    with stand_ins.tripy() as module:
        yield module


@pytest.fixture
def run(tp: Any) -> Run:
    """Traces a module on token ids and runs the trace in torch; the logits in float32."""

    def traced(model: Any, ids: Tensor) -> Tensor:
        return interpreter.run(model(tp.Tensor(ids.to(torch.int32)))).float()

    return traced
