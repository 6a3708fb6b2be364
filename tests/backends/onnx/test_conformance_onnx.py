"""The ONNX backend against the suite that every backend must pass."""

from __future__ import annotations

from backends.base import Backend
from backends.onnx.backend import OnnxBackend
from backends.testing import BackendConformance


class TestOnnx(BackendConformance):
    @staticmethod
    def create() -> Backend:
        return OnnxBackend()
