"""Every family that the walk knows."""

from __future__ import annotations

import pytest

from tests.calib.fusing.conftest import one_thread, tiny
from tests.tiny import CONFIGS, Tiny, make_tiny

__all__ = ["one_thread", "tiny"]


@pytest.fixture(scope="module")
def llama() -> Tiny:
    return make_tiny(CONFIGS["llama"]())
