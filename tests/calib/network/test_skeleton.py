"""A model built from a config and part of its weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from calib.errors import CheckpointError
from calib.fusing import FusedModel, materialize, unloaded
from calib.network.layout import StockTensors
from calib.network.skeleton import build_on_meta, build_skeleton
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, relative_l2, token_rows
from tests.tolerances import SAME_SUMS


def stock(fused: FusedModel) -> StockTensors:
    return StockTensors(fused.state, fused.wiring)


@pytest.fixture(scope="module")
def llama() -> FusedModel:
    return fuse_tiny(make_tiny(CONFIGS["llama"]()))


@pytest.mark.parametrize(
    "name", ["llama", "gemma", "gpt2", "phi3-partial-rope", "gpt_neox", "granite"]
)
def test_the_skeleton_with_all_weights_is_the_model(name: str) -> None:
    """Rotary frequencies, embedding scales and attention masks are real, though no checkpoint holds
    them.
    """
    fused = fuse_tiny(make_tiny(CONFIGS[name]()))
    skeleton = build_skeleton(fused.config.to_dict(), stock(fused), skip=())
    ids = token_rows()[1][None]
    assert (
        relative_l2(skeleton(input_ids=ids).logits, materialize(fused)(input_ids=ids).logits)
        <= SAME_SUMS
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unloaded_model_allocates_no_weight_and_has_real_buffers(name: str) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS[name]()))
    model = unloaded(fused)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert set(model.state_dict()) == set(fused.state)
    loaded = dict(materialize(fused).named_buffers())
    assert all(torch.equal(buffer, loaded[key]) for key, buffer in model.named_buffers())


def test_readers_of_one_model_share_one_module_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's config knows its folder and stored dtype, an artifact's the dtype that it was
    calibrated in: neither is another model.
    """
    built: list[int] = []
    build = AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_config",
        lambda config, **how: built.append(config.vocab_size) or build(config, **how),
    )
    own, other = (CONFIGS["llama"](), CONFIGS["llama"]())
    own.vocab_size = other.vocab_size = 31  # a model that no other test has built
    own.dtype, own._name_or_path = torch.bfloat16, "a/folder"

    for config in (own, other):
        network = build_on_meta(config, torch.float32)
        assert network.dtype == network.config.dtype == torch.float32
        assert network.name_or_path == ""
    assert built == [31]
    assert own.dtype == torch.bfloat16
    assert own._name_or_path == "a/folder"

    other.vocab_size = 30
    build_on_meta(other, torch.float32)
    build_on_meta(own, torch.float16)
    assert built == [31, 30, 31]


def test_weights_are_used_without_a_copy_and_are_frozen(llama: FusedModel) -> None:
    skeleton = build_skeleton(llama.config.to_dict(), llama.state, skip=())
    state: dict[str, Tensor] = skeleton.state_dict()
    assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in llama.state.items())
    assert not skeleton.training
    assert not any(parameter.requires_grad for parameter in skeleton.parameters())


def test_skipped_modules_need_no_weights(llama: FusedModel) -> None:
    skip = "model.layers.1.mlp.down_proj"
    floats = {name: tensor for name, tensor in llama.state.items() if not name.startswith(skip)}
    skeleton = build_skeleton(llama.config.to_dict(), floats, skip=[skip])
    assert isinstance(skeleton.get_submodule(skip), nn.Identity)


def test_a_missing_weight_is_named(llama: FusedModel) -> None:
    floats = {name: tensor for name, tensor in llama.state.items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"missing \['model.norm.weight'\]"):
        build_skeleton(llama.config.to_dict(), floats, skip=())


@pytest.mark.parametrize("name", ["model.extra.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_weight_that_the_model_has_not_is_named(llama: FusedModel, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"unexpected \['{name}'\]"):
        build_skeleton(llama.config.to_dict(), llama.state | {name: torch.zeros(48)}, skip=())


def test_a_weight_of_another_shape_is_named(llama: FusedModel) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        build_skeleton(
            llama.config.to_dict(), llama.state | {"model.norm.weight": torch.ones(7)}, skip=()
        )


def test_a_head_that_took_the_bias_of_its_norm_keeps_it() -> None:
    tiny = make_tiny(CONFIGS["gpt2"]())
    tiny.state["transformer.ln_f.weight"][7] = 1e-9
    fused = fuse_tiny(tiny, ["r1"])
    assert fused.refusals
    skeleton = build_skeleton(fused.config.to_dict(), stock(fused), skip=())
    ids = token_rows()[1][None]
    assert (
        relative_l2(skeleton(input_ids=ids).logits, materialize(fused)(input_ids=ids).logits)
        <= SAME_SUMS
    )
    assert float(fused.state["lm_head.bias"].abs().max()) > 0.1  # so that losing it would show
