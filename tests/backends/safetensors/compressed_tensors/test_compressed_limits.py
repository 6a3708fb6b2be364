"""What ``rotq backends`` says: refusals of what the format has not, warnings of what one of its
readers has not.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from backends.safetensors.backend import SafetensorsBackend
from calib.quantizing.plan import customised
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

TARGET = "compressed-tensors"
_NO_WARNING = {
    "int8",
    "int8-weight-only",
    "int4-weight-only",
    "float8",
    "float8-dynamic",
    "nvfp4",
    "mxfp8",
}


@pytest.mark.parametrize("name", LINEAR_SCHEMES)
def test_every_preset_is_written(name: str) -> None:
    assert linear_refusal(SafetensorsBackend(), LINEAR_SCHEMES[name], TARGET) is None
    assert (linear_warning(SafetensorsBackend(), LINEAR_SCHEMES[name], TARGET) is None) == (
        name in _NO_WARNING
    )


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
def test_what_the_format_has_not_is_refused(scheme: LinearScheme, words: str) -> None:
    reason = linear_refusal(SafetensorsBackend(), scheme, TARGET)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (_linear("w4a8"), "with calibrated scales of the input"),
        (_linear("w4a8-float8"), "SM90"),
        (_linear("w4a8-float8", activation_granularity="token"), "SM90"),
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
        (_linear("int8-dynamic"), "half the number of levels"),
        (_linear("mxfp4"), "Blackwell"),
    ],
)
def test_what_one_reader_has_not_is_warned_of(scheme: LinearScheme, words: str) -> None:
    assert linear_refusal(SafetensorsBackend(), scheme, TARGET) is None
    warning = linear_warning(SafetensorsBackend(), scheme, TARGET)
    assert warning is not None
    assert words in warning


@pytest.mark.parametrize("name", KV_SCHEMES)
def test_caches(name: str) -> None:
    assert cache_refusal(SafetensorsBackend(), KV_SCHEMES[name], TARGET) is None
    asymmetric = TensorScheme(INT8, PerTensor(), symmetric=False)
    assert "zero points" in (cache_refusal(SafetensorsBackend(), asymmetric, TARGET) or "")


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
