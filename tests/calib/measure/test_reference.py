"""The torch model that an export must reproduce: every part of it against arithmetic written out by
hand.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from calib.artifact import QuantizedLinear
from calib.fusing import materialize
from calib.measure.floor import split_logits
from calib.measure.reference import ReferenceLinear, build_reference, split_sums
from calib.rotations.rotation_set import hadamard_rotation
from calib.schemes import INT4, INT8, PerBlock, PerChannel, PerCluster, PerTensor, TensorScheme
from tests.tiny import (
    CONFIGS,
    fuse_tiny,
    make_tiny,
    quantize_fused,
    quantize_tiny,
    relative_l2,
    token_rows,
)
from tests.tolerances import SAME_SUMS, WEIGHT_ONLY

INPUT = TensorScheme(INT8, PerTensor())


def one_linear(*, online: str | None = None, static: bool = True) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    return QuantizedLinear(
        name="one",
        weight=torch.randint(-128, 128, (5, 12), dtype=torch.int8, generator=generator),
        weight_scale=torch.rand(5, generator=generator) + 0.01,
        weight_scheme=TensorScheme(INT8, PerChannel(0)),
        bias=torch.randn(5, generator=generator),
        input_scheme=INPUT if static else None,
        input_scale=torch.tensor(0.02) if static else None,
        online_rotation=online,
    )


def inputs() -> Tensor:
    """Mostly within the range of the scale, with some beyond it."""
    return torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1)) * 1.5


def test_a_linear_is_the_arithmetic_of_its_docstring() -> None:
    linear, x = one_linear(), inputs()
    assert linear.input_scale is not None
    assert linear.bias is not None
    integers = torch.clamp(torch.round(x / linear.input_scale), -128, 127)
    assert int((integers == 127).sum()) > 0  # some saturate
    exact = integers.double() @ linear.weight.double().T  # integer sums
    expected = (
        exact * linear.input_scale.double() * linear.weight_scale.double() + linear.bias.double()
    )
    found = ReferenceLinear(linear, None)(x)
    assert found.dtype == torch.float32
    assert relative_l2(found, expected) <= SAME_SUMS
    module = ReferenceLinear(linear, None)
    with split_sums(module):
        assert 0 < relative_l2(module(x), expected) <= SAME_SUMS
    assert torch.equal(module(x), found)


def test_a_weight_only_linear_leaves_its_input_alone() -> None:
    linear, x = one_linear(static=False), inputs()
    module = ReferenceLinear(linear, None)
    assert module.quantize(x) is x
    assert linear.bias is not None
    weight = linear.weight.double() * linear.weight_scale.double()[:, None]
    assert relative_l2(module(x), x.double() @ weight.T + linear.bias.double()) <= SAME_SUMS


def test_the_online_rotation_comes_before_the_quantizer() -> None:
    rotation = hadamard_rotation("r4", 12, layer=0, seed=3)
    linear, x = one_linear(online=rotation.name), inputs()
    found = ReferenceLinear(linear, rotation)(x)
    rotated = x @ rotation.dense().float()
    plain = ReferenceLinear(linear, None)
    # a different summation may round a few inputs to the next integer; without the rotation all
    # differ
    assert relative_l2(found, plain(rotated)) < 0.01
    assert relative_l2(found, plain(x)) > 0.5


def test_scales_follow_the_input_to_its_device() -> None:
    clustered = TensorScheme(INT8, PerCluster(2))
    linear = dataclasses.replace(
        one_linear(), input_scheme=clustered, input_scale=torch.ones(inputs().shape[-1])
    )
    # as good as any device but the CPU
    module = ReferenceLinear(linear, None).to("meta")
    assert module.quantize(inputs().to("meta")).device.type == "meta"


def test_blocked_weights_use_the_scale_of_their_block() -> None:
    weight = torch.ones(2, 10, dtype=torch.int8)
    scale = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    linear = dataclasses.replace(
        one_linear(static=False),
        weight=weight,
        weight_scale=scale,
        weight_scheme=TensorScheme(INT4, PerBlock(4)),
        bias=None,
    )
    found = ReferenceLinear(linear, None)(torch.ones(1, 10))
    assert found.tolist() == [[4 + 40 + 200, 8 + 80 + 400]]


@pytest.mark.parametrize("scheme", ["int8-weight-only", "int4-weight-only"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3-partial-rope"])
def test_weight_only_the_split_sum_differs_by_rounding_only(name: str, scheme: str) -> None:
    quantized = quantize_tiny(CONFIGS[name](), scheme, ["r1", "r2", "r4"])
    reference = build_reference(quantized)
    ids = torch.stack(token_rows([11, 11]))
    whole = reference(input_ids=ids).logits
    distance = relative_l2(split_logits(reference)(ids), whole)
    assert 0 < distance <= WEIGHT_ONLY  # not the same sums, and not another function
    assert torch.equal(reference(input_ids=ids).logits, whole)  # and only while it is asked


def test_the_split_sum_masks_padding_as_the_reference_does() -> None:
    # with a sliding window of 4
    quantized = quantize_tiny(CONFIGS["mistral"](), "int8-weight-only")
    ids = torch.stack(token_rows([11, 11]))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    reference = build_reference(quantized)
    run = partial(reference, input_ids=ids, attention_mask=mask, position_ids=positions)
    with split_sums(reference):
        split = run().logits
    found = [split, run().logits]
    kept = mask.bool()
    assert relative_l2(found[0][kept], found[1][kept]) <= WEIGHT_ONLY


@pytest.mark.parametrize("name", ["llama-bias-tied-headdim", "gpt2", "mixtral", "qwen2_moe"])
def test_it_is_close_to_the_float_model_that_was_quantized(name: str) -> None:
    """int8 weights cost about 1 %; a rotation that is lost or applied twice costs everything."""
    fused = fuse_tiny(make_tiny(CONFIGS[name]()), ["r1", "r2", "r3", "r4"])
    reference = build_reference(quantize_fused(fused, "int8-weight-only"))
    ids = token_rows()[1][None]
    assert (
        relative_l2(reference(input_ids=ids).logits, materialize(fused)(input_ids=ids).logits)
        < 0.05
    )


def test_a_head_with_the_bias_of_its_norm_is_in_the_reference() -> None:
    tiny = make_tiny(CONFIGS["gpt2"]())
    tiny.state["transformer.ln_f.weight"][7] = 1e-9
    fused = fuse_tiny(tiny, ["r1"])
    assert fused.refusals
    reference = build_reference(quantize_fused(fused, "int8-weight-only"))
    ids = token_rows()[1][None]
    assert (
        relative_l2(reference(input_ids=ids).logits, materialize(fused)(input_ids=ids).logits)
        < 0.05
    )


def test_it_is_float32_whatever_the_artifact_computes_in() -> None:
    quantized = quantize_fused(
        fuse_tiny(make_tiny(CONFIGS["llama"]()), dtype=torch.bfloat16), "int8"
    )
    reference = build_reference(quantized)
    assert {parameter.dtype for parameter in reference.parameters()} == {torch.float32}
    assert reference(input_ids=token_rows()[0][None]).logits.dtype == torch.float32
    names = {name for name, part in reference.named_modules() if isinstance(part, ReferenceLinear)}
    assert names == set(quantized.linears)
    assert isinstance(reference.get_submodule("lm_head"), nn.Linear)
