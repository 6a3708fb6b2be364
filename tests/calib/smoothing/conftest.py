"""The models of the fuser's tests, and what makes them compute in float64 throughout."""

from __future__ import annotations

from tests.calib.fusing.conftest import exact, one_thread, relative, tiny, tiny_of, tokens

__all__ = ["exact", "one_thread", "relative", "tiny", "tiny_of", "tokens"]
