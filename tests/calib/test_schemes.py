"""The table of schemes: that its rows are consistent, and that unknown names list what exists."""

from __future__ import annotations

import json

import pytest

from calib.errors import QuantizationError
from calib.schemes import (
    FLOAT,
    FLOAT8,
    FORMATS,
    INT4,
    INT8,
    LINEAR_SCHEMES,
    SCHEMES,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerCluster,
    PerTensor,
    PerToken,
    Scheme,
    TensorScheme,
    scheme_named,
    tensor_scheme_from_dict,
    tensor_scheme_to_dict,
)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_a_scheme_is_consistent(scheme: Scheme) -> None:
    assert scheme_named(scheme.name) is scheme
    assert scheme.weight_only == (scheme.activation is None)
    assert scheme.weight_only == (scheme.name.endswith("weight-only") or scheme.name == FLOAT)
    assert scheme.max_perplexity_ratio > 1
    assert scheme.description
    assert (scheme.weight is None) == (scheme.linear is None) == (scheme.name not in LINEAR_SCHEMES)
    assert scheme.weight is None or not scheme.weight.dynamic
    if scheme.activation is not None and not scheme.activation.dynamic:
        # static scales of activations are per tensor
        assert scheme.activation.granularity == PerTensor()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
def test_a_format_reaches_its_bound_on_both_sides(fmt: NumberFormat) -> None:
    assert fmt.qmin <= -fmt.maxbound
    assert fmt.maxbound == fmt.qmax
    if fmt.kind == "integer":
        assert (fmt.qmin, fmt.qmax) == (-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1)


def test_the_documented_presets() -> None:
    assert {
        name: (s.weight.format.name, s.weight.granularity) for name, s in LINEAR_SCHEMES.items()
    } == {
        "int8": ("int8", PerChannel(0)),
        "int8-dynamic": ("int8", PerChannel(0)),
        "int8-weight-only": ("int8", PerChannel(0)),
        "int4-weight-only": ("int4", PerBlock(128)),
        "w4a8": ("int4", PerBlock(128)),
        "w4a8-float8": ("int4", PerBlock(128)),
        "w4a4": ("int4", PerChannel(0)),
        "float8": ("float8_e4m3", PerTensor()),
        "float8-dynamic": ("float8_e4m3", PerChannel(0)),
        "nvfp4": ("float4_e2m1", PerBlock(16)),
        "mxfp4": ("float4_e2m1", PerBlock(32)),
        "mxfp8": ("float8_e4m3", PerBlock(32)),
    }
    assert SCHEMES.keys() - LINEAR_SCHEMES.keys() == {FLOAT}


SOME = [
    TensorScheme(INT8, PerCluster(4)),
    TensorScheme(INT4, PerToken(), symmetric=False, dynamic=True),
]


@pytest.mark.parametrize(
    "scheme",
    [
        *SOME,
        *(s.weight for s in LINEAR_SCHEMES.values()),
        *(s.activation for s in SCHEMES.values() if s.activation),
    ],
)
def test_a_tensor_scheme_survives_json(scheme: TensorScheme) -> None:
    assert tensor_scheme_from_dict(json.loads(json.dumps(tensor_scheme_to_dict(scheme)))) == scheme


@pytest.mark.parametrize(
    ("scheme", "calibrated"),
    [
        (TensorScheme(INT8, PerTensor()), True),
        (TensorScheme(INT8, PerToken(), dynamic=True), False),
        (SCHEMES["nvfp4"].activation, True),  # its second-level scale is static
        (SCHEMES["mxfp4"].activation, False),
    ],
)
def test_what_has_to_be_observed(scheme: TensorScheme, calibrated: bool) -> None:
    assert scheme.needs_calibration is calibrated


def test_only_integers_have_zero_points() -> None:
    with pytest.raises(QuantizationError, match="float8_e4m3 has no zero point"):
        TensorScheme(FLOAT8, PerTensor(), symmetric=False)


def test_an_unknown_scheme_lists_all_that_exist() -> None:
    with pytest.raises(QuantizationError, match="unknown scheme 'int3'") as caught:
        scheme_named("int3")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in SCHEMES)
