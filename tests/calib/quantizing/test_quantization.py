"""Resolving a scheme for one model: finer controls, overrides by pattern, and everything that is
refused.
"""

from __future__ import annotations

from typing import Any

import pytest

from calib.architectures import wiring_for
from calib.errors import QuantizationError
from calib.quantizing.plan import (
    KEPT_BY_OVERRIDE,
    KEPT_BY_SCHEME,
    Quantization,
    customised,
    resolve,
)
from calib.schemes import KV_SCHEMES, PerBlock, PerCluster, PerTensor, PerToken, scheme_named
from tests.tiny import CONFIGS


def resolved(name: str = "llama", scheme: str = "int8", **settings: Any) -> Quantization:
    config = CONFIGS[name]()
    return resolve(scheme_named(scheme), wiring_for(config), **settings)


def test_without_overrides_every_decoder_linear_gets_the_scheme() -> None:
    found = resolved()
    assert len(found.linears) == 14
    assert set(found.linears.values()) == {scheme_named("int8").linear}
    assert "lm_head" not in found.linears


def test_the_last_pattern_that_matches_counts() -> None:
    overrides = {
        "*.down_proj": "int8-weight-only",
        "model.layers.0.*": "float",
        "*.0.mlp.down_proj": "float8",
    }
    found = resolved(overrides=overrides)
    assert found.linears["model.layers.0.mlp.down_proj"] == scheme_named("float8").linear
    assert found.linears["model.layers.1.mlp.down_proj"] == scheme_named("int8-weight-only").linear
    assert found.linears["model.layers.1.mlp.up_proj"] == scheme_named("int8").linear
    assert "model.layers.0.mlp.up_proj" not in found.linears
    assert set(found.kept) == {
        name for name in resolved().linears if ".0." in name and "down" not in name
    }
    assert set(found.kept.values()) == {KEPT_BY_OVERRIDE}


def test_the_scheme_float_quantizes_what_an_override_names_and_nothing_else() -> None:
    nothing = resolved(scheme="float")
    assert nothing.linears == {}
    assert set(nothing.kept) == set(resolved().linears)
    assert set(nothing.kept.values()) == {KEPT_BY_SCHEME}
    found = resolved(
        scheme="float",
        overrides={"lm_head": "int8-weight-only", "*.0.mlp.*": "w4a8", "*.0.mlp.up_proj": "float"},
    )
    assert found.linears == {
        "model.layers.0.mlp.gate_proj": scheme_named("w4a8").linear,
        "model.layers.0.mlp.down_proj": scheme_named("w4a8").linear,
        "lm_head": scheme_named("int8-weight-only").linear,
    }
    assert found.kept["model.layers.0.mlp.up_proj"] == KEPT_BY_OVERRIDE
    assert found.kept["model.layers.1.mlp.up_proj"] == KEPT_BY_SCHEME


def test_head_and_embeddings_are_quantized_only_by_their_full_name() -> None:
    assert set(resolved(overrides={"*": "int8-weight-only"}).linears) == set(resolved().linears)
    found = resolved(
        overrides={"lm_head": "int8-weight-only", "model.embed_tokens": "int4-weight-only"}
    )
    names = list(found.linears)
    assert names[0] == "model.embed_tokens"
    assert names[-1] == "lm_head"
    assert len(names) == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.dwon_proj": "float"}, r"'\*\.dwon_proj' matches no linear"),
        ({"*.down_proj": "int3"}, "unknown scheme 'int3'"),
        ({"model.embed_tokens": "int8"}, "has no input to quantize"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(QuantizationError, match=message) as caught:
        resolved(overrides=overrides)
    assert caught.value.hint


def test_the_cache_is_a_matter_of_its_own() -> None:
    assert resolved(kv="float8").cache == KV_SCHEMES["float8"]
    with pytest.raises(QuantizationError, match="unknown KV cache format 'int2'"):
        resolved(kv="int2")


def test_finer_controls_change_one_thing_each() -> None:
    int4, int8 = scheme_named("int4-weight-only"), scheme_named("int8")
    assert customised(int4) == int4
    assert customised(int4, block_size=32).weight.granularity == PerBlock(32)
    assert customised(int4, weight_symmetric=False).weight.symmetric is False
    activation = customised(int8, activation_symmetric=False).activation
    assert activation is not None
    assert (activation.symmetric, activation.dynamic, activation.granularity) == (
        False,
        False,
        PerTensor(),
    )
    for text, granularity, dynamic in (
        ("token", PerToken(), True),
        ("cluster:4", PerCluster(4), False),
    ):
        activation = customised(int8, activation_granularity=text).activation
        assert activation is not None
        assert (activation.granularity, activation.dynamic) == (granularity, dynamic)


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        ("nvfp4", {"block_size": 32}, "the format of 'nvfp4' fixes its blocks"),
        ("nvfp4", {"activation_granularity": "tensor"}, "fixes the blocks of activations"),
        ("int4-weight-only", {"block_size": 0}, "a block of 0"),
        ("int4-weight-only", {"activation_symmetric": False}, "leaves activations in float"),
        ("int8", {"activation_granularity": "cluster:0"}, "unknown granularity 'cluster:0'"),
        ("int8", {"activation_granularity": "row"}, "unknown granularity 'row'"),
        ("float8", {"weight_symmetric": False}, "float8_e4m3 has no zero point"),
        ("float", {"block_size": 32}, "'float' quantizes nothing"),
        ("float", {"activation_symmetric": True}, "'float' quantizes nothing"),
    ],
)
def test_controls_that_a_scheme_does_not_have_are_refused(
    scheme: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuantizationError, match=message) as caught:
        customised(scheme_named(scheme), **settings)
    assert caught.value.hint
