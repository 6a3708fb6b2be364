"""Every module can be imported with the versions that are installed: what breaks first."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

OPTIONAL = {
    "compressed_tensors",
    "datasets",
    "lm_eval",
    "mlir_tensorrt",  # what nvtripy compiles with, and where there is no GPU cannot be installed
    "nvtripy",
    "openvino",
    "tensorrt",  # nvtripy imports it where it is installed without a GPU
    "tensorrt_rtx",
}
MODULES = [
    module.name
    for package in ("rotq", "exporter", "backends", "calib")
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_it_is_imported(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        pytest.skip(f"{missing.name} is not installed")
