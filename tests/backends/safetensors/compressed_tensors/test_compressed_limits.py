"""What ``rotq backends`` says: what the format has not, and what each of its readers has not or
computes its own way.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from backends.asking import refused_rotations, warnings_of
from backends.base import Request
from backends.safetensors.backend import SafetensorsBackend
from calib.architectures import KINDS, wiring_for
from calib.quantizing.plan import customised, resolve
from calib.schemes import (
    INT8,
    KV_SCHEMES,
    LINEAR_SCHEMES,
    SCHEMES,
    LinearScheme,
    PerBlock,
    PerChannel,
    PerTensor,
    TensorScheme,
)
from tests.answers import cache_refusal, linear_refusal, linear_warning
from tests.tiny import CONFIGS

VLLM, TRANSFORMERS, BOTH = "vllm", "transformers", "compressed-tensors"
TARGETS = (VLLM, TRANSFORMERS, BOTH)
_REFUSED = {"w4a8", "w4a8-float8"}
"""By vLLM, which has no kernel for the scales that these have by default."""
_WARNED = {VLLM: {"mxfp4"}, TRANSFORMERS: {"int8-dynamic", "w4a4", "mxfp4"}}


@pytest.mark.parametrize("name", LINEAR_SCHEMES)
def test_every_preset_is_written_for_a_reader(name: str) -> None:
    backend, scheme = SafetensorsBackend(), LINEAR_SCHEMES[name]
    refused = {target: linear_refusal(backend, scheme, target) is not None for target in TARGETS}
    assert refused == {VLLM: name in _REFUSED, TRANSFORMERS: False, BOTH: name in _REFUSED}
    for target, warned in _WARNED.items():
        assert (linear_warning(backend, scheme, target) is not None) == (name in warned)


def _linear(name: str, **controls: object) -> LinearScheme:
    found = customised(SCHEMES[name], **controls).linear  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (_linear("int8", activation_granularity="cluster:4"), "sets of channels"),
        (
            replace(LINEAR_SCHEMES["int8"], weight=TensorScheme(INT8, PerChannel(1))),
            "per output channel",
        ),
        (
            replace(
                LINEAR_SCHEMES["nvfp4"],
                weight=replace(LINEAR_SCHEMES["nvfp4"].weight, granularity=PerBlock(8)),
            ),
            "blocks of 16",
        ),
        (replace(LINEAR_SCHEMES["int8"], input=LINEAR_SCHEMES["float8"].input), "of one kind"),
        (replace(LINEAR_SCHEMES["w4a8"], input=LINEAR_SCHEMES["mxfp8"].input), "of one kind"),
        (replace(LINEAR_SCHEMES["mxfp4"], input=LINEAR_SCHEMES["nvfp4"].input), "of one kind"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_what_the_format_has_not_is_refused(scheme: LinearScheme, words: str, target: str) -> None:
    reason = linear_refusal(SafetensorsBackend(), scheme, target)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (_linear("w4a8"), "with calibrated scales of the input"),
        (_linear("w4a8-float8"), "symmetric blocks of 128 alone"),
        (
            _linear("w4a8-float8", activation_granularity="token", block_size=64),
            "symmetric blocks of 128 alone",
        ),
        (_linear("int8", block_size=32), "with calibrated scales of the input"),
        (_linear("w4a4", activation_symmetric=False), "with zero points of the input"),
        (
            _linear("int8-dynamic", block_size=32, activation_symmetric=False),
            "with zero points of the input",
        ),
        (_linear("int8", weight_symmetric=False), "INT8 weights with zero points"),
        (
            replace(LINEAR_SCHEMES["int8-weight-only"], weight=TensorScheme(INT8, PerTensor())),
            "refuses one scale",
        ),
        (_linear("float8", block_size=32), "squares of 128"),
    ],
)
def test_what_vllm_has_no_kernel_for_is_refused_where_it_reads(
    scheme: LinearScheme, words: str
) -> None:
    backend = SafetensorsBackend()
    for target in (VLLM, BOTH):
        assert words in (linear_refusal(backend, scheme, target) or "")
    assert linear_refusal(backend, scheme, TRANSFORMERS) is None


@pytest.mark.parametrize(
    ("scheme", "target", "words"),
    [
        (_linear("w4a8-float8", activation_granularity="token"), VLLM, "SM90"),
        (_linear("mxfp4"), VLLM, "Blackwell"),
        (_linear("mxfp4"), TRANSFORMERS, "clips the largest value"),
        (_linear("int8-dynamic"), TRANSFORMERS, "half the number of levels"),
        (_linear("w4a8", activation_granularity="token"), TRANSFORMERS, "half the number"),
    ],
)
def test_what_a_reader_computes_its_own_way_is_warned_of(
    scheme: LinearScheme, target: str, words: str
) -> None:
    backend = SafetensorsBackend()
    assert words in (linear_warning(backend, scheme, target) or "")
    assert linear_warning(backend, scheme, BOTH) is not None


@pytest.mark.parametrize("name", KV_SCHEMES)
def test_caches(name: str) -> None:
    backend = SafetensorsBackend()
    refused = {target for target in TARGETS if cache_refusal(backend, KV_SCHEMES[name], target)}
    assert refused == (set() if name == "float8" else {VLLM, BOTH})
    asymmetric = TensorScheme(INT8, PerTensor(), symmetric=False)
    assert "zero points" in (cache_refusal(backend, asymmetric, TRANSFORMERS) or "")


def test_rotations_while_running_are_for_those_who_apply_them() -> None:
    """Transformers ignores what ``transform_config`` says: with R4 it gives nonsense."""
    backend = SafetensorsBackend()
    refused = {target: set(refused_rotations(backend, target, KINDS)) for target in TARGETS}
    assert refused == {VLLM: {"r3"}, TRANSFORMERS: {"r3", "r4"}, BOTH: {"r3", "r4"}}
    (warning,) = warnings_of(backend, VLLM, {}, ["r1", "r4"])
    assert "R4: " in warning
    assert "tensor parallelism" in warning
    assert warnings_of(backend, VLLM, {}, ["r1", "r2"]) == []


@pytest.mark.parametrize(
    ("family", "kinds", "words"),
    [
        ("llama", ["r4"], None),
        ("mixtral", ["r4"], "to linears alone, not to the experts"),
        ("gpt2", ["r4"], "no transform of a linear with a bias"),
        ("gpt2", ["r1", "r2"], None),
    ],
)
def test_where_vllm_applies_no_transform_r4_is_refused_before_the_job(
    family: str, kinds: list[str], words: str | None
) -> None:
    found = refused_rotations(SafetensorsBackend(), VLLM, kinds, CONFIGS[family]().to_dict())
    assert found.keys() == (set() if words is None else {"r4"})
    assert words is None or words in found["r4"]


@pytest.mark.parametrize(
    ("family", "scheme", "overrides", "kv", "words"),
    [
        ("gpt2", "int8", {}, None, "Conv1D"),
        ("gpt2", "float", {}, "float8", "projections of keys"),
        ("gpt_neox", "int8", {}, "float8", "projections of keys"),
        ("mixtral", "float8", {}, None, "with experts"),
        ("mixtral", "int8-weight-only", {"*.experts.*": "float"}, None, "with experts"),
        ("mixtral", "int8-weight-only", {"*.q_proj": "int4-weight-only"}, None, "with experts"),
        ("mixtral", "int8-weight-only", {}, None, None),
        ("llama", "int8", {}, "float8", None),
        ("phi3", "int8", {}, "float8", None),
    ],
)
def test_models_that_transformers_does_not_read(
    family: str, scheme: str, overrides: dict[str, str], kv: str | None, words: str | None
) -> None:
    wiring = wiring_for(CONFIGS[family]())
    wanted = resolve(SCHEMES[scheme], wiring, overrides=overrides, kv=kv)
    config = CONFIGS[family]().to_dict()
    request = Request(TRANSFORMERS, linears=wanted.linears, cache=wanted.cache, config=config)
    backend = SafetensorsBackend()
    reasons = [each for each in backend.refusals(request) if each.severity == "refused"]
    if words is None:
        assert reasons == []
        return
    assert words in " ".join(each.reason for each in reasons)
    assert all(each.hint for each in reasons)
    assert [each.reason for each in backend.refusals(replace(request, target=BOTH))]
    assert not [
        each for each in backend.refusals(replace(request, target=VLLM)) if words in each.reason
    ]


def test_limits_import_neither_torch_nor_the_library() -> None:
    code = (
        "import sys, backends.safetensors.compressed_tensors.limits\n"
        "sys.exit(bool({'torch', 'compressed_tensors'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from backends.safetensors.compressed_tensors.library import require
    from calib.errors import BackendError

    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(
        BackendError, match="compressed-tensors library, which is not installed"
    ) as found:
        require("compressed_tensors")
    assert found.value.hint == "pip install 'rotq[compressed-tensors]'"
