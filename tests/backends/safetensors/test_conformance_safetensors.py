"""The safetensors backend against the suite that every backend must pass."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from backends.base import Backend
from backends.safetensors.backend import SafetensorsBackend
from backends.testing import BackendConformance

MISSING = () if find_spec("compressed_tensors") else ("vllm", "transformers", "compressed-tensors")


class TestSafetensors(BackendConformance):
    targets = tuple(target for target in SafetensorsBackend.targets if target not in MISSING)

    @staticmethod
    def create() -> Backend:
        return SafetensorsBackend()


def test_every_target_was_tried() -> None:
    if MISSING:
        pytest.skip("three targets need the compressed-tensors library")
