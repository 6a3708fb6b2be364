"""The functions that users know from elsewhere are in ``calib`` under these names, and importing it
stays light.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import calib


@pytest.mark.parametrize(
    "name",
    [
        "create_forward_loop",
        "modelopt_quantize",
        "convert_to_scale",
        "get_submodule",
        "compute_scale",
    ],
)
def test_a_known_function_says_shapes_errors_and_source(name: str) -> None:
    function = getattr(calib, name)
    assert function.__name__ == name
    for part in ("Args:", "Raises:"):
        assert part in function.__doc__, part


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        calib.nothing  # noqa: B018 - the access is the test


def test_importing_the_packages_loads_nothing_heavy() -> None:
    code = (
        "import sys, calib, backends, exporter; print([m for m in ('torch', 'modelopt', 'onnx') if"
        " m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
