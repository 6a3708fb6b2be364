"""Finding backends through entry points, whatever state a plugin is in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backends.base import Backend
from backends.onnx.backend import OnnxBackend
from backends.registry import available, check_cache, check_target, get_backend
from calib.errors import BackendError
from calib.quantization import customised
from calib.schemes import KV_SCHEMES, SCHEMES, LinearScheme
from tests.plugins import install_plugins


def named(scheme: str) -> dict[str, LinearScheme]:
    return {f"scheme '{scheme}'": SCHEMES[scheme].linear}


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugins(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_built_in_backend_is_found_through_its_entry_point() -> None:
    backend = get_backend("onnx")
    assert isinstance(backend, OnnxBackend)
    info = {entry.name: entry for entry in available()}["onnx"]
    assert info.error is None
    assert info.distribution.startswith("rotq ")
    assert info.targets == backend.targets
    assert set(info.schemes["ort"]) == set(SCHEMES)
    expressible = {name for name, reason in info.schemes["ort"].items() if reason is None}
    assert expressible == {"int8", "int8-weight-only", "int4-weight-only"}


@pytest.mark.usefixtures("plugins")
def test_a_broken_plugin_is_listed_with_its_error_and_stops_nothing() -> None:
    entries = {entry.name: entry for entry in available()}
    assert list(entries) == sorted(entries)
    assert entries["broken"].error is not None
    assert "ModuleNotFoundError" in entries["broken"].error
    assert "no_such_module" in entries["broken"].error
    assert entries["broken"].targets == ()
    assert entries["broken"].distribution == "stub 1.0"
    assert entries["stub"].error is None
    assert entries["stub"].schemes["one"]["float8"] == "no float8 kernels"
    assert entries["stub"].schemes["two"]["float8"] is None
    assert entries["onnx"].error is None


@pytest.mark.usefixtures("plugins")
def test_getting_a_broken_plugin_names_it_and_its_distribution() -> None:
    with pytest.raises(BackendError, match=r"'broken' of stub 1\.0 failed to load: No module named") as caught:
        get_backend("broken")
    assert caught.value.hint == "reinstall or remove that package"


@pytest.mark.usefixtures("plugins")
def test_an_unknown_backend_lists_those_installed() -> None:
    with pytest.raises(BackendError, match="unknown backend 'onx'") as caught:
        get_backend("onx")
    assert caught.value.hint == "installed backends: broken, onnx, stub"


def test_targets_are_checked_and_the_first_is_the_default() -> None:
    backend: Backend = OnnxBackend()
    assert check_target(backend, named("int8"), None) == "ort"
    assert check_target(backend, named("int8"), "ort") == "ort"
    with pytest.raises(BackendError, match="'onnx' has no target 'vllm'") as caught:
        check_target(backend, named("int8"), "vllm")
    assert caught.value.hint == "its targets are: ort"


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("float8", "no float8"),
        ("mxfp4", "no float8 or float4 kernels"),
        ("int8-dynamic", "calibrated scales"),
        ("w4a8", "would dequantize these on every run"),
        ("w4a4", "calibrated scales"),
    ],
)
def test_a_scheme_that_a_target_cannot_express_is_refused_with_the_reason_and_the_others(
    scheme: str, reason: str
) -> None:
    with pytest.raises(BackendError, match=rf"cannot express scheme '{scheme}': .*{reason}") as caught:
        check_target(OnnxBackend(), named(scheme), "ort")
    assert caught.value.hint == "schemes it can express: int8, int8-weight-only, int4-weight-only"


@pytest.mark.parametrize(
    ("controls", "reason"),
    [
        ({"weight_symmetric": False}, "no zero points"),
        ({"activation_symmetric": False}, "no zero points"),
        ({"activation_granularity": "cluster:4"}, "more than one scale of an activation"),
        ({"activation_granularity": "token"}, "calibrated scales"),
        ({"block_size": 64}, "would dequantize these on every run"),
    ],
)
def test_finer_controls_are_judged_linear_by_linear(controls: dict[str, Any], reason: str) -> None:
    linear = customised(SCHEMES["int8"], **controls).linear
    with pytest.raises(BackendError, match=rf"cannot express 'a\.linear': .*{reason}"):
        check_target(OnnxBackend(), {"other": SCHEMES["int8"].linear, "'a.linear'": linear}, None)


def test_a_cache_that_a_target_cannot_express_is_refused() -> None:
    check_cache(OnnxBackend(), None, "ort")
    with pytest.raises(BackendError, match="cannot express a KV cache of int8: the graph's cache") as caught:
        check_cache(OnnxBackend(), KV_SCHEMES["int8"], "ort")
    assert "--kv" in str(caught.value.hint)


def test_listing_backends_imports_neither_torch_nor_a_runtime() -> None:
    code = (
        "import sys; from backends.registry import available, get_backend, check_target; available();"
        "from calib.schemes import SCHEMES; check_target(get_backend('onnx'), {'it': SCHEMES['int8'].linear}, None);"
        "heavy = {'torch', 'transformers', 'modelopt', 'onnx', 'onnxruntime', 'onnx_ir', 'onnxscript'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
