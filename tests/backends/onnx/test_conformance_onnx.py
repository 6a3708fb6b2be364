"""The ONNX backend against the suite that every backend must pass."""

from __future__ import annotations

import pytest

from backends.base import Backend
from backends.onnx.backend import OnnxBackend
from backends.testing import BackendConformance


class TestOnnxRuntime(BackendConformance):
    targets = ("ort",)

    @staticmethod
    def create() -> Backend:
        return OnnxBackend()


class TestTensorRT(TestOnnxRuntime):
    """In ONNX Runtime, which takes its graphs as far as they are of the standard domain."""

    targets = ("tensorrt",)
    # qwen2 has the operators of llama, and a trace in float16 of its own takes seconds
    families = ("llama", "gpt2")


@pytest.mark.runtimes
class TestOpenVino(TestOnnxRuntime):
    """In OpenVINO, or without it in ONNX Runtime."""

    targets = ("openvino",)
