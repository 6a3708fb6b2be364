"""A folded scale changes no output: logits before and after, for every family, and what each side
becomes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.architectures import NormSpec
from calib.errors import QuantizationError
from calib.fusing import FusedModel, materialize
from calib.smoothing.fold import fold_scales
from calib.smoothing.groups import SmoothingGroup, smoothing_groups
from calib.smoothing.scales import reader_weight
from calib.smoothing.smooth import fold_all
from tests.tiny import fuse_tiny

OfName = Callable[[str], Any]
Patch = Callable[[Any], Any]
Distance = Callable[[Tensor, Tensor], float]


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def groups_of(fused: FusedModel) -> list[SmoothingGroup]:
    return smoothing_groups(fused.wiring, fused.rotations)[0]


def random_scales(group: SmoothingGroup, seed: int = 0) -> Tensor:
    """Positive, over a range of about 100."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(group.width, generator=generator, dtype=torch.float64).exp()


def folded(fused: FusedModel, scale: Callable[[SmoothingGroup, int], Tensor]) -> FusedModel:
    state = dict(fused.state)
    for seed, group in enumerate(groups_of(fused)):
        fold_scales(state, group, scale(group, seed), fused.wiring)
    return replace(fused, state=state)


@pytest.mark.parametrize(
    ("kinds", "fold_norms"), [("", True), ("r1 r2", True), ("r1 r2 r3 r4", True), ("r2", False)]
)
def test_float64_logits_agree(
    tiny: Any, kinds: str, fold_norms: bool, tokens: Tensor, exact: Patch, relative: Distance
) -> None:
    fused = fuse_tiny(tiny, kinds.split(), torch.float64, fold_norms=fold_norms)
    before = {name: tensor.clone() for name, tensor in fused.state.items()}
    smoothed = folded(fused, random_scales)
    reference = logits(exact(materialize(fused)), tokens)
    # A few thousand float64 products in another order; the same bound as for the fuser.
    assert relative(logits(exact(materialize(smoothed)), tokens), reference) <= 1e-10
    assert all(torch.equal(fused.state[name], tensor) for name, tensor in before.items())
    changed = {name for name in before if not torch.equal(smoothed.state[name], before[name])}
    assert changed == touched_by(groups_of(fused), before)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2_moe", "opt"])
@pytest.mark.parametrize("signs", [None, 3])
def test_float32_logits_agree_around_r4(
    name: str, signs: int | None, tiny_of: OfName, tokens: Tensor, relative: Distance
) -> None:
    fused = fuse_tiny(tiny_of(name), ["r1", "r2", "r4"], signs=signs)
    around = [group for group in groups_of(fused) if group.rotation is not None]
    assert around
    scales = {group.name: random_scales(group, seed) for seed, group in enumerate(around)}
    smoothed = fold_all(fused, scales)
    # Every weight is rounded once more to float32 (6e-8), and so is every sum of two layers.
    distance = relative(logits(materialize(smoothed), tokens), logits(materialize(fused), tokens))
    assert distance <= 1e-5
    for group in around:
        (reader,) = group.readers
        plain = group.unrotated(fused.state[reader.weight])
        after = group.unrotated(smoothed.state[reader.weight])
        # in the rotated basis an entry is as large as its row, and rounded in proportion
        bound = float(after.abs().amax()) * 1e-6
        torch.testing.assert_close(after, plain * scales[group.name], rtol=0, atol=bound)


def touched_by(groups: list[SmoothingGroup], state: dict[str, Tensor]) -> set[str]:
    """Names that a fold has to change; a bias of zero stays what it is."""
    names = {spec.weight for group in groups for spec in (*group.readers, group.writer)}
    biases = {str(group.writer.bias) for group in groups}
    return names | {name for name in biases if name in state and bool(state[name].any())}


def test_readers_see_a_smaller_input_and_hold_a_larger_weight(
    tiny_of: OfName, tokens: Tensor
) -> None:
    fused = fuse_tiny(tiny_of("llama"), ["r1", "r2"], torch.float64)
    smoothed = folded(fused, random_scales)
    for seed, group in enumerate(groups_of(fused)):
        s = group.expanded(random_scales(group, seed))
        plain, after = (input_of(group, model, tokens) for model in (fused, smoothed))
        # The stock norm rounds to float32 inside, before its gain.
        torch.testing.assert_close(after * s, plain, rtol=1e-6, atol=1e-6)
        for spec in group.readers:
            weights = [reader_weight(model.state[spec.weight]) for model in (fused, smoothed)]
            own = next((one for one in groups_of(fused) if one.writer == spec), None)
            rows = weights[0].shape[0]
            divided = torch.ones(rows, 1, dtype=torch.float64)
            if own is not None:  # up and v are divided as writers, too
                divided[own.rows[0], 0] = random_scales(own, groups_of(fused).index(own))
            torch.testing.assert_close(weights[1] * divided, weights[0] * s, rtol=1e-12, atol=0)


def input_of(group: SmoothingGroup, fused: FusedModel, tokens: Tensor) -> Tensor:
    seen: list[Tensor] = []
    model = materialize(fused)
    model.get_submodule(group.observed_at).register_forward_hook(
        lambda module, args, output: seen.append(args[0])
    )
    logits(model, tokens)
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_of_one_is_bit_identical(tiny: Any, dtype: torch.dtype) -> None:
    fused = fuse_tiny(tiny, ["r1", "r2"], dtype)
    same = folded(fused, lambda group, seed: torch.ones(group.width))
    assert all(torch.equal(same.state[name], tensor) for name, tensor in fused.state.items())


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_readers_cancel_exactly_whatever_the_dtype(
    name: str, dtype: torch.dtype, tiny_of: OfName
) -> None:
    # What is stored as g - 1 in bfloat16 has errors of several per cent: the readers have to follow
    # it.
    fused = fuse_tiny(tiny_of(name), [], dtype)
    offset = fused.wiring.architecture.gain_offset
    for group in groups_of(fused):
        if not isinstance(group.writer, NormSpec):
            continue
        state = dict(fused.state)
        s = fold_scales(state, group, random_scales(group), fused.wiring)
        gain = state[group.writer.weight].double() + offset
        torch.testing.assert_close(gain * s, torch.ones_like(gain), rtol=1e-14, atol=0)
        for spec in group.readers:
            plain, after = (reader_weight(tensors[spec.weight]) for tensors in (fused.state, state))
            assert torch.equal(after, (plain.double() * s).to(dtype))  # rounded once


def test_gain_that_would_round_to_zero_keeps_its_channel(tiny_of: OfName) -> None:
    fused = fuse_tiny(tiny_of("gemma"), [], torch.bfloat16)
    group = next(group for group in groups_of(fused) if isinstance(group.writer, NormSpec))
    scales = torch.ones(group.width)
    scales[3] = 1e4  # 1e-4 - 1 is -1 in bfloat16
    state = dict(fused.state)
    assert torch.equal(
        fold_scales(state, group, scales, fused.wiring), torch.ones(group.width).double()
    )
    assert all(torch.equal(state[name], fused.state[name]) for name in state)


def test_one_layer_alone_needs_its_own_tensors_only(tiny_of: OfName) -> None:
    fused = fuse_tiny(tiny_of("phi3"), ["r1", "r2"])
    groups, _ = smoothing_groups(fused.wiring, fused.rotations, layer=1)
    block = {
        name: tensor for name, tensor in fused.state.items() if name.startswith("model.layers.1.")
    }
    for group in groups:
        fold_scales(block, group, random_scales(group), fused.wiring)
    every = [group for group in groups_of(fused) if ".1." in group.name]
    assert [group.name for group in groups] == [group.name for group in every]
    whole = dict(fused.state)
    for group in every:
        fold_scales(whole, group, random_scales(group), fused.wiring)
    assert all(torch.equal(block[name], whole[name]) for name in block)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_cannot_be_divided_by_are_refused(tiny_of: OfName, value: float) -> None:
    fused = fuse_tiny(tiny_of("llama"))
    group = groups_of(fused)[0]
    with pytest.raises(
        QuantizationError, match=rf"scale for {group.name} is not positive and finite"
    ):
        fold_scales(dict(fused.state), group, torch.full((group.width,), value), fused.wiring)


def test_scales_of_another_length_are_refused(tiny_of: OfName) -> None:
    fused = fuse_tiny(tiny_of("llama"))
    group = groups_of(fused)[0]
    with pytest.raises(QuantizationError, match=r"has shape \[5\], it needs \[16\]"):
        fold_scales(dict(fused.state), group, torch.ones(5), fused.wiring)


def test_overflow_of_float16_is_named(tiny_of: OfName) -> None:
    fused = fuse_tiny(tiny_of("llama"), dtype=torch.float16)
    group = next(group for group in groups_of(fused) if isinstance(group.writer, NormSpec))
    scales = torch.full((group.width,), 1e6)
    with pytest.raises(QuantizationError, match=r"q_proj\.weight does not fit torch\.float16"):
        fold_scales(dict(fused.state), group, scales, fused.wiring)
    with pytest.raises(
        QuantizationError, match=rf"{group.name}\.weight does not fit torch\.float16"
    ):
        fold_scales(dict(fused.state), group, 1 / scales, fused.wiring)
