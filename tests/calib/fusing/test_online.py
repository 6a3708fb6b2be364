"""Online rotations: they act, they cancel, and they act where caches and quantizers see them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.errors import RotationError
from calib.fusing import fuse, materialize
from calib.network.online import attach_online
from calib.rotations.rotation_set import RotationSet

OfName = Callable[[str], Any]
Distance = Callable[[Tensor, Tensor], float]


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def build(tiny: Any, kinds: list[str], dtype: torch.dtype = torch.float64) -> Any:
    return materialize(fuse(tiny.state, tiny.wiring, tiny.rotations(kinds), dtype=dtype))


def test_without_its_online_half_r4_is_wrong(tiny: Any, tokens: Tensor, relative: Distance) -> None:
    # of an odd width, a Hadamard matrix without signs is the identity
    rotations = tiny.rotations(["r4"], signs=5)
    fused = fuse(tiny.state, tiny.wiring, rotations, dtype=torch.float64)
    bare = copy.copy(fused)
    object.__setattr__(bare, "rotations", RotationSet())
    reference = logits(tiny.model(), tokens)
    assert relative(logits(materialize(bare), tokens), reference) > 1e-3
    assert relative(logits(materialize(fused), tokens), reference) <= 1e-6


def test_down_projection_sees_the_rotated_activation(tiny_of: OfName, tokens: Tensor) -> None:
    tiny = tiny_of("llama")
    seen: list[Tensor] = []
    for kinds in ([], ["r4"]):
        model = build(tiny, kinds)
        # A hook sees the arguments after every pre-hook: what a quantizer inside the module would
        # see.
        model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda module, args, output: seen.append(args[0])
        )
        logits(model, tokens)
    plain, rotated = seen
    torch.testing.assert_close(
        rotated, tiny.rotations(["r4"])["R4.0"].apply(plain), rtol=1e-12, atol=1e-12
    )


def test_cached_keys_are_rotated_and_values_too(
    tiny: Any, tokens: Tensor, relative: Distance
) -> None:
    kinds = [kind for kind in ("r2", "r3") if kind in tiny.offered()]
    with torch.no_grad():
        plain = build(tiny, [])(tokens, use_cache=True).past_key_values
        rotated = build(tiny, kinds)(tokens, use_cache=True).past_key_values
    rotations = tiny.rotations(kinds)
    for layer in range(2):
        keys, values = plain.layers[layer].keys, plain.layers[layer].values
        turned = rotations[f"R3.{layer}"].apply(keys) if "r3" in kinds else keys
        assert relative(rotated.layers[layer].keys, turned) <= 1e-6
        assert "r3" not in kinds or relative(rotated.layers[layer].keys, keys) > 0.1
        assert (
            relative(rotated.layers[layer].values, values @ rotations[f"R2.{layer}"].dense())
            <= 1e-6
        )


def test_decoding_with_a_cache_equals_prefill(
    tiny: Any, tokens: Tensor, relative: Distance
) -> None:
    model = build(tiny, tiny.offered())
    reference = logits(tiny.model(), tokens)
    cache, steps = None, []
    with torch.no_grad():
        for position in range(tokens.shape[1]):
            output = model(
                tokens[:, position : position + 1], past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            steps.append(output.logits)
    assert relative(torch.cat(steps, dim=1), reference) <= 1e-6


def test_left_padding_changes_nothing(tiny_of: OfName, tokens: Tensor, relative: Distance) -> None:
    for name in ("llama", "gpt2", "opt"):
        tiny = tiny_of(name)
        model = build(tiny, tiny.offered())
        padded = torch.cat([torch.zeros(2, 3, dtype=tokens.dtype), tokens], dim=1)
        mask = (padded != 0).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            outputs = [
                m(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
                for m in (model, tiny.model())
            ]
        assert relative(*outputs) <= 1e-6


def test_rope_of_other_models_is_left_alone_even_after_an_error(
    tiny_of: OfName, tokens: Tensor
) -> None:
    tiny = tiny_of("llama")
    plain = tiny.model()
    before = first_keys(plain, tokens)
    rotated = build(tiny, ["r3"])
    rotated.model.layers[0].self_attn.o_proj.register_forward_pre_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        logits(rotated, tokens)
    assert torch.equal(first_keys(plain, tokens), before)


@torch.no_grad()
def first_keys(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=True).past_key_values.layers[0].keys


def _fail(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise ZeroDivisionError


def test_module_names_stay_and_copies_stay_rotated(tiny_of: OfName, tokens: Tensor) -> None:
    tiny = tiny_of("phi3")
    model = build(tiny, tiny.offered())
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in tiny.model().named_modules()
    ]
    assert model.training is False
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_stay_rotated_whatever_the_models_config_says(
    tiny_of: OfName, name: str, tokens: Tensor
) -> None:
    tiny = tiny_of(name)
    model = build(tiny, ["r4"])
    before = logits(model, tokens)
    model.config._experts_implementation = "eager"  # what ModelOpt does before it quantizes
    assert torch.equal(logits(model, tokens), before)
    model.set_experts_implementation("batched_mm")
    assert torch.equal(logits(model, tokens), before)


def test_attaching_twice_is_refused(tiny_of: OfName) -> None:
    tiny = tiny_of("llama")
    model = build(tiny, ["r4"])
    with pytest.raises(RotationError, match="attached to this model already"):
        attach_online(model, tiny.wiring, tiny.rotations(["r4"]))


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export_keeps_the_rotations_in_the_graph(
    tiny_of: OfName, tokens: Tensor, relative: Distance
) -> None:
    model = build(tiny_of("llama"), ["r1", "r2", "r3", "r4"], torch.float32)
    program = torch.export.export(_Logits(model), (tokens,)).module()
    other = tokens.flip(1)
    for ids in (tokens, other):
        with torch.no_grad():
            assert relative(program(ids), logits(model, ids)) <= 1e-6
    assert not torch.equal(program(tokens), program(other))
