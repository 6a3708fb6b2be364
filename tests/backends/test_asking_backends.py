"""What rotq asks a backend, and the words in which it says no."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from backends.asking import (
    check,
    expressible,
    files_of,
    reasons_against,
    refused_rotations,
    slow_linears,
    warnings_of,
)
from backends.base import Backend, Reason, Request
from backends.onnx.backend import OnnxBackend
from backends.registry import get_backend
from backends.rules import Limits
from backends.safetensors.backend import SafetensorsBackend
from calib.errors import BackendError
from calib.schemes import KV_SCHEMES, LINEAR_SCHEMES, SCHEMES
from tests.plugins import install_plugins

INT8, FLOAT8 = LINEAR_SCHEMES["int8"], LINEAR_SCHEMES["float8"]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Target one refuses float8; two warns of int4, has no R4 and takes no options; no target takes
    a float8 cache or an odd vocabulary.
    """
    install_plugins(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return get_backend("stub")


@pytest.mark.parametrize(
    ("asked", "words", "hint"),
    [
        ({"logits": "last"}, "with --logits last: it computes them all", "leave --logits out"),
        (
            {"kv_buffer": "shared"},
            "with --kv-buffer shared: its caches only grow",
            "leave --kv-buffer out",
        ),
    ],
)
def test_options_are_refused_by_the_name_of_their_flag(
    stub: Backend, asked: Mapping[str, Any], words: str, hint: str
) -> None:
    check(stub, Request("one", **asked))
    check(stub, Request("two"))
    with pytest.raises(BackendError) as caught:
        check(stub, Request("two", **asked))
    assert caught.value.message == f"target 'two' of backend 'stub' cannot be written {words}"
    assert caught.value.hint == hint


def test_a_preset_is_refused_with_the_reason_and_the_others(stub: Backend) -> None:
    words = r"'one' of backend 'stub' cannot express scheme 'float8': no float8 kernels"
    with pytest.raises(BackendError, match=words) as caught:
        check(stub, Request("one", linears={"*": FLOAT8}), called="scheme 'float8'")
    possible = str(caught.value.hint).removeprefix("schemes it can express: ").split(", ")
    assert possible == [
        name for name in SCHEMES if name not in ("float8", "float8-dynamic", "mxfp8")
    ]
    check(stub, Request("two", linears={"*": FLOAT8}), called="scheme 'float8'")


def test_linears_are_judged_one_by_one_and_named(stub: Backend) -> None:
    linears = {"a.linear": INT8, "b.linear": FLOAT8, "c.linear": FLOAT8}
    with pytest.raises(BackendError, match=r"cannot express 'b\.linear': no float8 kernels"):
        check(stub, Request("one", linears=linears))
    check(stub, Request("two", linears=linears, cache=KV_SCHEMES["int8"]))

    assert expressible(stub, "two", [INT8, FLOAT8], KV_SCHEMES["int8"])
    assert not expressible(stub, "one", [INT8, FLOAT8], None)
    assert not expressible(stub, "two", [], KV_SCHEMES["float8"])
    assert expressible(stub, "two", [], None, ["r1", "r3"])
    assert not expressible(stub, "two", [], None, ["r1", "r4"])


def test_a_cache_that_a_target_cannot_express_is_refused(stub: Backend) -> None:
    check(stub, Request("one", cache=KV_SCHEMES["int8"]))
    with pytest.raises(
        BackendError, match="cannot express a KV cache of float8_e4m3: no float8 cache"
    ) as caught:
        check(stub, Request("one", cache=KV_SCHEMES["float8"]))
    assert "--kv" in str(caught.value.hint)


def test_rotations_that_a_target_cannot_express_are_refused(stub: Backend) -> None:
    check(stub, Request("two", rotations=("r1", "r2", "r3")))
    check(stub, Request("one", rotations=("r4",)))
    with pytest.raises(
        BackendError, match="'two' of backend 'stub' cannot express R4: it has no place for"
    ) as caught:
        check(stub, Request("two", rotations=("r1", "r4")))
    assert "without r4 in --rotate" in str(caught.value.hint)
    assert refused_rotations(stub, "two", ["r1", "r4"]) == {"r4": "it has no place for one"}


def test_a_model_that_a_target_cannot_express_is_refused_with_what_to_do(stub: Backend) -> None:
    check(stub, Request("one", config={"vocab_size": 100}))
    with pytest.raises(
        BackendError, match="'one' of backend 'stub' cannot express this model: its vocab"
    ) as caught:
        check(stub, Request("one", config={"vocab_size": 101}))
    assert caught.value.hint == "pad the vocabulary"


def test_the_parts_of_a_model_are_refused_before_the_model(stub: Backend) -> None:
    request = Request("one", config={"vocab_size": 101}, linears={"it": FLOAT8})
    with pytest.raises(BackendError, match="no float8 kernels"):
        check(stub, request)


def test_what_runs_slowly_is_warned_of_once_a_scheme(stub: Backend) -> None:
    linears = {"a": LINEAR_SCHEMES["w4a8"], "b": LINEAR_SCHEMES["w4a8"], "c": INT8}
    check(stub, Request("two", linears=linears))  # what is slow is not refused
    assert warnings_of(stub, "one", linears) == []
    assert warnings_of(stub, "two", linears) == [
        "2 linears with int4 weights in blocks of 128, int8 inputs per tensor: int4 weights are"
        " unpacked first"
    ]
    assert slow_linears(stub, "two", linears) == dict.fromkeys(
        ("a", "b"), "int4 weights are unpacked first"
    )


def test_an_option_newer_than_the_backend_is_refused_for_it_unless_left_out(stub: Backend) -> None:
    check(stub, Request("two", linears={"it": INT8}))
    assert reasons_against(stub, Request("one", prefix=7)) == [
        Reason(
            "the backend was written for version 2 of the backend contract, which has no such"
            " option",
            about="option",
            name="prefix",
        )
    ]
    with pytest.raises(BackendError, match="cannot be written with --prefix 7: the backend was"):
        check(stub, Request("one", prefix=7))


def test_limits_of_an_option_may_depend_on_its_value() -> None:
    limits = Limits(options={"kv_buffer": {"shared": "its caches only grow"}, "logits": "all"})
    assert limits.reasons(Request("one")) == []
    assert limits.reasons(Request("one", kv_buffer="shared", logits="last")) == [
        Reason("all", about="option", name="logits"),
        Reason("its caches only grow", about="option", name="kv_buffer"),
    ]
    other = Limits(options={"kv_buffer": {"another": "never heard of it"}})
    assert other.reasons(Request("one", kv_buffer="shared")) == []


def test_a_backend_that_lists_no_files_is_named_instead(stub: Backend) -> None:
    assert files_of(stub, Request("one"), 0) == ("files of stub",)


@pytest.mark.parametrize(
    ("backend", "request_", "nbytes", "files"),
    [
        (OnnxBackend(), Request("ort"), 10**12, "model.onnx model.onnx.data genai_config.json"),
        (
            OnnxBackend(),
            Request("tensorrt", max_shard_bytes=10**6),
            10**7,
            "model.onnx model-*-of-*.onnx.data",
        ),
        (
            SafetensorsBackend(),
            Request("tripy"),
            10**9,
            "model.safetensors model.safetensors.index.json tripy.json rotq_bundle.json",
        ),
        (
            SafetensorsBackend(),
            Request("tensorrt"),
            10**10,
            "model-*-of-*.safetensors model.safetensors.index.json rotq_bundle.json",
        ),
        (
            SafetensorsBackend(),
            Request("modelopt", linears={"it": INT8}),
            10**9,
            "model.safetensors model.safetensors.index.json config.json hf_quant_config.json"
            " rotq_bundle.json",
        ),
        (
            SafetensorsBackend(),
            Request("modelopt"),
            10**9,
            "model.safetensors model.safetensors.index.json config.json rotq_bundle.json",
        ),
    ],
)
def test_files_are_listed_with_their_shards(
    backend: Backend, request_: Request, nbytes: int, files: str
) -> None:
    assert files_of(backend, request_, nbytes) == tuple(files.split())
