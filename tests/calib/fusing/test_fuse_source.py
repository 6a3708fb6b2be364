"""What the fuser accepts as a checkpoint, and what it refuses by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.architectures import Wiring, wiring_for
from calib.errors import CheckpointError, RotationError, UnsupportedModelError
from calib.fusing import FusedModel, fuse
from calib.network.checkpoint import Checkpoint
from calib.rotations.rotation_set import RotationSet, fused_rotation

OfName = Callable[[str], Any]


def fold(tiny: Any, state: Mapping[str, Tensor]) -> FusedModel:
    return fuse(state, tiny.wiring, RotationSet(), dtype=torch.float32)


def assert_same(left: FusedModel, right: FusedModel) -> None:
    assert left.state.keys() == right.state.keys()
    assert all(torch.equal(left.state[name], right.state[name]) for name in left.state)


def test_saved_checkpoint_gives_the_same_as_the_state_dict(tiny: Any, tmp_path: Any) -> None:
    # save_pretrained writes published names: one tensor per expert, embed_out, no tied head.
    from calib.network.checkpoint import load_config, open_checkpoint

    tiny.model(torch.float32).save_pretrained(tmp_path, max_shard_size="30KB")
    opened = fuse(
        open_checkpoint(tmp_path),
        wiring_for(load_config(tmp_path)),
        RotationSet(),
        dtype=torch.float32,
    )
    assert_same(opened, fold(tiny, {name: tensor.float() for name, tensor in tiny.state.items()}))
    assert opened.unused == ()


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("llama-bias-tied-headdim", "model.")]
)
def test_names_of_the_bare_decoder(tiny_of: OfName, name: str, prefix: str) -> None:
    tiny = tiny_of(name)
    bare = {
        key.removeprefix(prefix): tensor
        for key, tensor in tiny.state.items()
        if key != "lm_head.weight"
    }
    bare["h.0.attn.bias"] = torch.ones(1)  # a mask that old GPT-2 checkpoints carry
    fused = fold(tiny, bare)
    assert_same(fused, fold(tiny, tiny.state))
    assert fused.unused == ("h.0.attn.bias",)


def test_tied_model_stored_by_its_head_alone(tiny_of: OfName) -> None:
    tiny = tiny_of("qwen2")
    state = {
        key: tensor for key, tensor in tiny.state.items() if key != "model.embed_tokens.weight"
    }
    assert_same(fold(tiny, state), fold(tiny, tiny.state))


def test_two_different_tensors_stay_apart_whatever_the_config_says(tiny_of: OfName) -> None:
    tiny = tiny_of("qwen2")
    state = tiny.state | {"lm_head.weight": tiny.state["lm_head.weight"] + 1}
    gain = state["model.norm.weight"]
    torch.testing.assert_close(
        fold(tiny, state).state["lm_head.weight"], (state["lm_head.weight"] * gain).float()
    )


def test_missing_tensor_is_named(tiny_of: OfName) -> None:
    tiny = tiny_of("llama")
    del tiny.state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        fold(tiny, tiny.state)


@pytest.mark.parametrize(
    ("wrap", "hint"),
    [
        (lambda name: f"_orig_mod.{name}", "model._orig_mod"),
        (lambda name: f"module.{name}", "model.module"),
        (lambda name: f"base_model.model.{name}", "merge first"),
        (lambda name: name.replace("_proj.", "_proj.base_layer."), "merge first"),
    ],
)
def test_names_of_wrappers_are_said_with_what_was_expected(
    tiny_of: OfName, wrap: Callable[[str], str], hint: str
) -> None:
    tiny = tiny_of("llama")
    state = {wrap(name): tensor for name, tensor in tiny.state.items()}
    with pytest.raises(
        CheckpointError, match=r"the checkpoint holds (\S+), expected (\S+)"
    ) as caught:
        fold(tiny, state)
    held, wanted = caught.value.message.removeprefix("the checkpoint holds ").split(", expected ")
    assert (held in state, held) == (True, wrap(wanted))
    assert hint in str(caught.value.hint)


def test_missing_expert_is_named(tiny_of: OfName) -> None:
    tiny = tiny_of("mixtral")
    stacked = tiny.state.pop("model.layers.1.mlp.experts.down_proj")
    for expert in (0, 1, 3):
        tiny.state[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"] = stacked[expert]
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.2\.w2\.weight is missing"
    ):
        fold(tiny, tiny.state)


@pytest.mark.parametrize("lazy", [False, True])
def test_wrong_shape_is_named_with_both_shapes(tiny_of: OfName, lazy: bool) -> None:
    tiny = tiny_of("llama")
    tiny.state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(44, 48)
    state = Checkpoint(tiny.state) if lazy else tiny.state
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight has shape \[44, 48\], .* calls for \[88, 48\]"
    ):
        fold(tiny, state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"]
)
def test_nan_and_inf_are_named(tiny_of: OfName, name: str, value: float) -> None:
    tiny = tiny_of("llama")
    tiny.state[name].view(-1)[5] = value
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or Inf"):
        fold(tiny, tiny.state)


def test_integer_weights_are_refused(tiny_of: OfName) -> None:
    tiny = tiny_of("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    tiny.state[name] = tiny.state[name].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"holds torch\.int8"):
        fold(tiny, tiny.state)


def test_parameter_that_the_table_does_not_know_is_refused(tiny_of: OfName) -> None:
    tiny = tiny_of("qwen3")
    entry = replace(tiny.wiring.architecture, untouched=())
    tiny.wiring = Wiring(entry, tiny.config)
    with pytest.raises(UnsupportedModelError, match=r"k_norm\.weight"):
        fold(tiny, tiny.state)


def test_refused_rotation_is_refused_with_its_reason(tiny_of: OfName) -> None:
    tiny = tiny_of("gemma2")
    rotations = RotationSet([fused_rotation("r1", torch.eye(48))])
    with pytest.raises(RotationError, match="R1 is refused for Gemma-2: it normalises the outputs"):
        fuse(tiny.state, tiny.wiring, rotations, dtype=torch.float32)


def test_overflow_of_float16_is_named(tiny_of: OfName) -> None:
    tiny = tiny_of("llama")
    tiny.state["model.layers.1.post_attention_layernorm.weight"][3] = 1e6
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight does not fit float16"
    ):
        fuse(tiny.state, tiny.wiring, RotationSet(), dtype=torch.float16)


def test_progress_is_reported_for_every_weight(tiny_of: OfName) -> None:
    tiny = tiny_of("llama")
    calls: list[tuple[str, int, int | None]] = []
    fuse(
        tiny.state,
        tiny.wiring,
        RotationSet(),
        dtype=torch.float32,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("fuse", done, 15) for done in range(16)]
