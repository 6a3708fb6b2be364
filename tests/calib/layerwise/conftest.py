"""Every family that the walk knows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.tiny import CONFIGS, Tiny, make_tiny


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of 48 rows only lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """One model of every family and variant."""
    return make_tiny(CONFIGS[request.param]())


@pytest.fixture(scope="module")
def llama() -> Tiny:
    return make_tiny(CONFIGS["llama"]())
