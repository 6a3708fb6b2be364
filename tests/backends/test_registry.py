"""Finding backends through entry points, whatever state a plugin is in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backends.base import Backend
from backends.onnx.backend import OnnxBackend
from backends.registry import (
    available,
    check_cache,
    check_expressible,
    check_kv_buffer,
    check_logits,
    check_model,
    check_rotations,
    check_target,
    expressible,
    get_backend,
    warnings_of,
)
from calib.errors import BackendError
from calib.schemes import INT4, KV_SCHEMES, LINEAR_SCHEMES, SCHEMES, LinearScheme
from tests.plugins import install_plugins


def named(scheme: str) -> dict[str, LinearScheme]:
    return {f"scheme '{scheme}'": LINEAR_SCHEMES[scheme]}


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugins(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("plugins")
def test_logits_of_the_last_token_are_refused_where_all_are_computed() -> None:
    stub = get_backend("stub")
    check_logits(stub, "one", "last")
    check_logits(stub, "two", "all")
    with pytest.raises(
        BackendError, match="cannot be written with --logits last: it computes them all"
    ):
        check_logits(stub, "two", "last")


@pytest.mark.usefixtures("plugins")
def test_a_shared_buffer_is_refused_where_caches_only_grow() -> None:
    stub = get_backend("stub")
    check_kv_buffer(stub, "one", "shared")
    check_kv_buffer(stub, "two", "grown")
    with pytest.raises(
        BackendError, match="cannot be written with --kv-buffer shared: its caches only"
    ) as caught:
        check_kv_buffer(stub, "two", "shared")
    assert caught.value.hint == "leave --kv-buffer out"


def test_the_built_in_backend_is_found_through_its_entry_point() -> None:
    backend = get_backend("onnx")
    assert isinstance(backend, OnnxBackend)
    info = {entry.name: entry for entry in available()}["onnx"]
    assert info.error is None
    assert info.distribution.startswith("rotq ")
    assert info.targets == backend.targets
    for schemes in info.schemes.values():
        assert list(schemes) == list(SCHEMES)
        assert schemes["float"] is None  # what is not quantized is expressed everywhere


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
    assert entries["stub"].warnings["one"] == {}
    assert entries["stub"].warnings["two"].keys() == {
        name for name, scheme in LINEAR_SCHEMES.items() if scheme.weight.format == INT4
    }
    assert entries["stub"].caches["own"] == {
        "int8": None,
        "int4": None,
        "float8": "no float8 cache",
    }
    assert entries["stub"].rotations["two"] == {
        "r1": None,
        "r2": None,
        "r3": None,
        "r4": "it has no place for one",
    }
    assert entries["onnx"].error is None


@pytest.mark.usefixtures("plugins")
def test_getting_a_broken_plugin_names_it_and_its_distribution() -> None:
    with pytest.raises(
        BackendError, match=r"'broken' of stub 1\.0 failed to load: No module named"
    ) as caught:
        get_backend("broken")
    assert caught.value.hint == "reinstall or remove that package"


@pytest.mark.usefixtures("plugins")
def test_an_unknown_backend_lists_those_installed() -> None:
    with pytest.raises(BackendError, match="unknown backend 'onx'") as caught:
        get_backend("onx")
    assert str(caught.value.hint).startswith("installed backends: broken, onnx, ")


@pytest.fixture
def stub(plugins: None) -> Backend:
    """Refuses float8 and speaks float32 for target one, warns of int4 for two, and has no dtype for
    own.
    """
    return get_backend("stub")


def test_targets_are_checked_and_the_first_is_the_default(stub: Backend) -> None:
    assert check_target(stub, named("int8"), None) == "one"
    assert check_target(stub, named("int8"), "two") == "two"
    with pytest.raises(BackendError, match="'stub' has no target 'vllm'") as caught:
        check_target(stub, named("int8"), "vllm")
    assert caught.value.hint == "its targets are: one, two, own"


def test_a_scheme_that_a_target_cannot_express_is_refused_with_the_reason_and_the_others(
    stub: Backend,
) -> None:
    with pytest.raises(
        BackendError, match="cannot express scheme 'float8': no float8 kernels"
    ) as caught:
        check_target(stub, named("float8"), "one")
    possible = str(caught.value.hint).removeprefix("schemes it can express: ").split(", ")
    assert possible == [
        name for name in SCHEMES if name not in ("float8", "float8-dynamic", "mxfp8")
    ]
    assert check_target(stub, named("float8"), "two") == "two"


def test_linears_are_judged_one_by_one_and_named(stub: Backend) -> None:
    linears = {"a.linear": LINEAR_SCHEMES["int8"], "b.linear": LINEAR_SCHEMES["float8"]}
    with pytest.raises(BackendError, match=r"cannot express 'b\.linear': no float8 kernels"):
        check_expressible(stub, "one", linears, None)
    check_expressible(stub, "two", linears, KV_SCHEMES["int8"])
    assert expressible(stub, "two", linears.values(), KV_SCHEMES["int8"])
    assert not expressible(stub, "one", linears.values(), None)
    assert not expressible(stub, "two", [], KV_SCHEMES["float8"])
    assert expressible(stub, "two", [], None, ["r1", "r3"])
    assert not expressible(stub, "two", [], None, ["r1", "r4"])


def test_a_cache_that_a_target_cannot_express_is_refused(stub: Backend) -> None:
    check_cache(stub, None, "one")
    check_cache(stub, KV_SCHEMES["int8"], "one")
    with pytest.raises(
        BackendError, match="cannot express a KV cache of float8_e4m3: no float8 cache"
    ) as caught:
        check_cache(stub, KV_SCHEMES["float8"], "one")
    assert "--kv" in str(caught.value.hint)


def test_rotations_that_a_target_cannot_express_are_refused(stub: Backend) -> None:
    check_rotations(stub, "two", ["r1", "r2", "r3"])
    check_rotations(stub, "one", ["r4"])
    with pytest.raises(
        BackendError, match="'two' of backend 'stub' cannot express R4: it has no place for"
    ) as caught:
        check_rotations(stub, "two", ["r1", "r4"])
    assert "without r4 in --rotate" in str(caught.value.hint)


def test_a_model_that_a_target_cannot_express_is_refused_with_what_to_do(stub: Backend) -> None:
    check_model(stub, "one", {"vocab_size": 100}, {})
    with pytest.raises(
        BackendError, match="'one' of backend 'stub' cannot express this model: its vocab"
    ) as caught:
        check_model(stub, "one", {"vocab_size": 101}, {})
    assert caught.value.hint == "pad the vocabulary"


def test_what_runs_slowly_is_warned_of_once_a_scheme(stub: Backend) -> None:
    linears = {
        "a": LINEAR_SCHEMES["w4a8"],
        "b": LINEAR_SCHEMES["w4a8"],
        "c": LINEAR_SCHEMES["int8"],
    }
    assert warnings_of(stub, "one", linears) == []
    assert warnings_of(stub, "two", linears) == [
        "2 linears with int4 weights in blocks of 128, int8 inputs per tensor: int4 weights are"
        " unpacked first"
    ]


def test_listing_backends_imports_neither_torch_nor_a_runtime() -> None:
    available()  # asks the runtimes that are installed; from then on their answers are at hand
    code = (
        "import sys; from backends.registry import available, get_backend, check_target;"
        " available();from calib.schemes import LINEAR_SCHEMES as S;"
        " check_target(get_backend('onnx'), {'it': S['int8']}, None);heavy = {'torch',"
        " 'transformers', 'modelopt', 'onnx', 'onnxruntime', 'onnx_ir', 'onnxscript'};sys.exit(',"
        " '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
