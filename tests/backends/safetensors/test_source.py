"""What a bundle's config says of its source model."""

from __future__ import annotations

import pytest

from backends.safetensors.backend import SafetensorsBackend
from backends.safetensors.source import input_widths
from calib.quantizing.plan import customised
from calib.schemes import LINEAR_SCHEMES, SCHEMES, LinearScheme
from tests.answers import model_refusal
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, quantize_fused


@pytest.mark.parametrize(
    "family", ["llama-bias-tied-headdim", "gpt2-untied-inner", "mixtral", "qwen2_moe"]
)
def test_widths_are_those_of_the_artifact(family: str) -> None:
    config = CONFIGS[family]()
    model = quantize_fused(fuse_tiny(make_tiny(config)), "int8-weight-only")
    widths = input_widths(config.to_dict())
    assert {name: widths[name] for name in model.linears} == {
        name: linear.weight.shape[1] for name, linear in model.linears.items()
    }
    assert widths["lm_head"] == 48
    assert (
        next(
            iter(
                widths[name] for name in ("model.embed_tokens", "transformer.wte") if name in widths
            )
        )
        == 48
    )


def _blocks_of_eight() -> LinearScheme:
    found = customised(SCHEMES["int4-weight-only"], block_size=8).linear
    assert found is not None
    return found


Q, DOWN, EXPERT = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.experts.down_proj.3",
)
CASES: list[tuple[str, str, str, LinearScheme, str | None]] = [
    (
        "tripy",
        "llama-odd",
        Q,
        LINEAR_SCHEMES["int4-weight-only"],
        "blocks of 128 do not divide the 45",
    ),
    ("tensorrt", "llama-odd", DOWN, LINEAR_SCHEMES["w4a8"], "blocks of 128 do not divide the 99"),
    ("tensorrt", "llama", DOWN, LINEAR_SCHEMES["int4-weight-only"], None),
    ("tensorrt", "llama", DOWN, LINEAR_SCHEMES["mxfp8"], "blocks of 32 do not divide the 88"),
    ("tensorrt", "llama", Q, LINEAR_SCHEMES["nvfp4"], None),
    ("tensorrt", "mixtral", EXPERT, LINEAR_SCHEMES["nvfp4"], "blocks of 16 do not divide the 88"),
    ("tensorrt", "gpt2", "transformer.h.1.mlp.c_proj", LINEAR_SCHEMES["mxfp8"], None),
    (
        "tensorrt",
        "gpt2",
        "transformer.h.1.mlp.c_fc",
        LINEAR_SCHEMES["mxfp8"],
        "blocks of 32 do not divide the 48",
    ),
    # one block: a scale per channel
    ("compressed-tensors", "llama-odd", Q, LINEAR_SCHEMES["int4-weight-only"], None),
    ("compressed-tensors", "llama-odd", Q, _blocks_of_eight(), "blocks of 8 do not divide the 45"),
    (
        "compressed-tensors",
        "llama",
        DOWN,
        LINEAR_SCHEMES["nvfp4"],
        "blocks of 16 do not divide the 88",
    ),
]


@pytest.mark.parametrize(("target", "family", "name", "scheme", "words"), CASES)
def test_blocks_that_do_not_fit_are_refused_before_calibration(
    target: str, family: str, name: str, scheme: LinearScheme, words: str | None
) -> None:
    found = model_refusal(SafetensorsBackend(), CONFIGS[family]().to_dict(), {name: scheme}, target)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert words in found.reason
        assert f"'{name}" in found.reason
        assert "float" in found.hint
