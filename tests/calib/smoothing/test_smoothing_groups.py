"""Every linear is in one group or has a reason, and groups hold what has to change together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers

from calib.architectures import NormSpec
from calib.rotations.rotation_set import RotationSet
from calib.smoothing.groups import SmoothingGroup, smoothing_groups
from tests.tiny import OPT, make_tiny

OfName = Callable[[str], Any]


def split(tiny: Any, kinds: list[str]) -> tuple[dict[str, SmoothingGroup], dict[str, str]]:
    offered: Any = [kind for kind in kinds if kind in tiny.offered()]
    groups, reasons = smoothing_groups(tiny.wiring, tiny.rotations(offered))
    assert len({group.name for group in groups}) == len(groups)
    return {group.name: group for group in groups}, reasons


@pytest.mark.parametrize("kinds", [[], ["r1", "r2", "r3", "r4"]])
def test_every_linear_is_in_one_group_or_has_a_reason(tiny: Any, kinds: list[str]) -> None:
    groups, reasons = split(tiny, kinds)
    found = [name for group in groups.values() for name in group.reader_names] + list(reasons)
    assert len(found) == len(set(found))
    quantizable = {spec.name for spec in tiny.wiring.linears if spec.quantizable}
    assert quantizable <= set(found)


def test_a_norm_takes_everything_that_reads_it_along(tiny: Any) -> None:
    groups, _ = split(tiny, [])
    for group in groups.values():
        if isinstance(group.writer, NormSpec):
            readers = [spec.name for spec in tiny.wiring.readers(group.name)]
            assert list(group.reader_names) == readers


def test_llama(tiny_of: OfName) -> None:
    groups, reasons = split(tiny_of("llama"), [])
    layer = "model.layers.1."
    assert {
        name.removeprefix(layer): group.reader_names
        for name, group in groups.items()
        if ".1." in name
    } == {
        "self_attn.v_proj": (f"{layer}self_attn.o_proj",),
        "mlp.up_proj": (f"{layer}mlp.down_proj",),
        "input_layernorm": tuple(f"{layer}self_attn.{one}_proj" for one in "qkv"),
        "post_attention_layernorm": (f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"),
    }
    assert groups[f"{layer}self_attn.v_proj"].heads == (2, 3, 8)
    assert list(reasons) == ["lm_head"]


def test_nothing_passes_gelu_or_stands_before_olmo(tiny_of: OfName) -> None:
    assert "gelu_new" in split(tiny_of("gpt2"), [])[1]["transformer.h.0.mlp.c_proj"]
    assert "residual stream itself" in split(tiny_of("olmo2"), [])[1]["model.layers.0.mlp.up_proj"]
    assert "no gain" in split(tiny_of("opt-noaffine"), [])[1]["model.decoder.layers.0.fc1"]


def test_a_pair_around_r4_knows_it_and_is_left_out_of_a_search(tiny_of: OfName) -> None:
    tiny = tiny_of("llama")
    rotations = tiny.rotations(["r2", "r4"])
    groups, _ = smoothing_groups(tiny.wiring, rotations)
    assert {group.name: group.rotation for group in groups if group.rotation} == {
        f"model.layers.{layer}.mlp.up_proj": rotations[f"R4.{layer}"] for layer in (0, 1)
    }
    searched, reasons = smoothing_groups(tiny.wiring, rotations, search=True)
    assert searched == [group for group in groups if not group.rotation]
    assert "searched" in reasons["model.layers.0.mlp.down_proj"]
    # and whatever lets no scale through lets none through with R4 behind it
    assert "gelu_new" in split(tiny_of("gpt2"), ["r4"])[1]["transformer.h.0.mlp.c_proj"]


def test_scales_pass_relu_and_no_other_activation() -> None:
    for activation in ("relu", "gelu"):
        tiny = make_tiny(transformers.OPTConfig(**OPT, activation_function=activation))
        groups, reasons = split(tiny, [])
        assert ("model.decoder.layers.0.fc1" in groups) == (activation == "relu")
        assert ("model.decoder.layers.0.fc2" in reasons) == (activation != "relu")


@pytest.mark.parametrize(
    ("name", "writer", "rows"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", [(96, 144)]),
        ("phi3", "model.layers.0.self_attn.qkv_proj", [(64, 80)]),
        ("phi3", "model.layers.0.mlp.gate_up_proj", [(88, 176)]),
        (
            "gpt_neox",
            "gpt_neox.layers.0.attention.query_key_value",
            [(24 * h + 16, 24 * h + 24) for h in range(6)],
        ),
    ],
)
def test_of_a_fused_linear_only_the_rows_that_make_the_input(
    name: str, writer: str, rows: list[tuple[int, int]], tiny_of: OfName
) -> None:
    groups, _ = split(tiny_of(name), [])
    assert [(part.start, part.stop) for part in groups[writer].rows] == rows


def test_routers_are_multiplied_and_experts_left_out(tiny_of: OfName) -> None:
    groups, reasons = split(tiny_of("qwen2_moe"), [])
    mlp = "model.layers.1.mlp"
    assert groups["model.layers.1.post_attention_layernorm"].reader_names == (
        f"{mlp}.gate",
        f"{mlp}.experts.gate_up_proj",
        f"{mlp}.shared_expert.gate_proj",
        f"{mlp}.shared_expert.up_proj",
        f"{mlp}.shared_expert_gate",
    )
    assert groups[f"{mlp}.shared_expert.up_proj"].width == 56
    assert "expert" in reasons[f"{mlp}.experts.down_proj"]


def test_linear_writers_come_before_the_norms_that_feed_them(tiny: Any) -> None:
    groups, _ = smoothing_groups(tiny.wiring, RotationSet(), layer=0)
    kinds = [isinstance(group.writer, NormSpec) for group in groups]
    assert kinds == sorted(kinds)
