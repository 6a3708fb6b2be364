"""The suite that every backend must pass. Run it with pytest where this package is installed."""

from __future__ import annotations

from rotq_npz.backend import NpzBackend

from backends.base import Backend
from backends.testing import BackendConformance


class TestNpz(BackendConformance):
    @staticmethod
    def create() -> Backend:
        return NpzBackend()
