"""The table of schemes: that its rows are consistent, and that unknown names list what exists."""

from __future__ import annotations

import pytest

from calib.errors import QuantizationError
from calib.schemes import FORMATS, SCHEMES, NumberFormat, PerBlock, PerChannel, PerTensor, Scheme, scheme_named


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_a_scheme_is_consistent(scheme: Scheme) -> None:
    assert scheme_named(scheme.name) is scheme
    assert scheme.weight_only == (scheme.activation is None)
    assert scheme.weight_only == scheme.name.endswith("weight-only")
    assert scheme.max_perplexity_ratio > 1
    assert scheme.description
    if scheme.activation is not None:
        assert scheme.activation.granularity == PerTensor()  # static scales of activations are per tensor


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
def test_a_format_reaches_its_bound_on_both_sides(fmt: NumberFormat) -> None:
    assert fmt.qmin <= -fmt.maxbound
    assert fmt.maxbound == fmt.qmax
    if fmt.kind == "integer":
        assert (fmt.qmin, fmt.qmax) == (-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1)


def test_the_documented_presets() -> None:
    assert {name: (s.weight.format.name, s.weight.granularity) for name, s in SCHEMES.items()} == {
        "int8": ("int8", PerChannel(0)),
        "int8-weight-only": ("int8", PerChannel(0)),
        "int4-weight-only": ("int4", PerBlock(128)),
        "float8": ("float8_e4m3", PerTensor()),
    }


def test_an_unknown_scheme_lists_all_that_exist() -> None:
    with pytest.raises(QuantizationError, match="unknown scheme 'int3'") as caught:
        scheme_named("int3")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in SCHEMES)
