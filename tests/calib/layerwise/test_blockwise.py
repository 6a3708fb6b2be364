"""Layer-wise quantization against that of the whole model: the same scales, cache and smoothing, to
the bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.architectures.experts import with_parameters
from calib.artifact import QuantizedModel, load_artifact
from calib.artifact.files import artifact_tensors
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.fusing import FusedModel, fuse, materialize, with_prefix
from calib.layerwise.calibrator import WalkSettings, quantize_blockwise
from calib.layerwise.prefix import with_prefix_blockwise
from calib.measure.reference import build_reference
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import Quantization, resolve
from calib.schemes import scheme_named
from calib.smoothing.groups import groups_of
from calib.smoothing.methods import Smoothing, smoothing_named
from calib.smoothing.observe import observe_channels
from calib.smoothing.smooth import smooth
from tests.tiny import CONFIGS, PROVENANCE, Tiny, make_tiny, token_rows

KINDS: list[Any] = ["r1", "r2", "r3", "r4"]
TABLES = ("lm_head", "transformer.wte")
CASES = [
    ("llama", "int8", {}),
    ("llama", "int8", {"observer": "percentile:99"}),
    ("llama", "int8", {"kv": "int8"}),
    ("llama", "int4-weight-only", {"weights": "gptq"}),
    ("llama", "w4a4", {"overrides": {"*.0.mlp.*": "int8", "*.1.self_attn.*": "float"}}),
    ("gpt2", "int8", {"weights": "mse"}),
    ("gpt2", "int4-weight-only", {"weights": "gptq", "kv": "float8"}),
    ("gemma", "float8", {}),
    ("opt", "int8", {"kv": "int4"}),
    ("mixtral", "int8", {}),
    ("qwen2_moe", "int4-weight-only", {"weights": "gptq"}),
    ("qwen3_moe", "int8", {"overrides": {"*.experts.gate_up_proj": "float"}}),
    # the head and embeddings, with static inputs, second moments, and other observers
    ("qwen2", "int8", {"overrides": {"lm_head": "int8", "model.embed_tokens": "int8-weight-only"}}),
    (
        "gpt2",
        "int4-weight-only",
        {
            "weights": "gptq",
            "overrides": dict.fromkeys(TABLES, "int8-weight-only"),
        },
    ),
    ("mixtral", "int8", {"observer": "percentile:99", "overrides": {"lm_head": "int8"}}),
    ("llama", "float", {"overrides": {"lm_head": "int8"}}),
]


def prepared(
    name: str, scheme: str, settings: dict[str, Any], wanted: Sequence[Any] = KINDS
) -> tuple[FusedModel, FusedModel, Quantization]:
    """The fused model, held and lazy, and what to do with it; norms are kept without R1."""
    tiny: Tiny = make_tiny(CONFIGS[name]())
    kinds = [
        kind
        for kind in wanted
        if kind in tiny.offered() and not (kind == "r3" and name in ("gpt2", "opt"))
    ]
    held, lazy = (
        fuse(
            tiny.state,
            tiny.wiring,
            tiny.rotations(kinds),
            dtype=torch.float32,
            fold_norms=False,
            lazy=flag,
        )
        for flag in (False, True)
    )
    return held, lazy, resolve(scheme_named(scheme), tiny.wiring, **settings)


def blockwise(
    lazy: FusedModel,
    how: Quantization,
    folder: Path,
    smoothing: Smoothing | None = None,
    **settings: Any,
) -> QuantizedModel:
    (folder / "out").mkdir(parents=True)
    batches = length_batches(token_rows(), 4)
    return quantize_blockwise(
        lazy,
        how,
        batches,
        PROVENANCE,
        folder / "work",
        folder / "out",
        smoothing=smoothing,
        walk=WalkSettings(max_memory=2**20, **settings),
    )


def assert_same(found: QuantizedModel, expected: QuantizedModel) -> None:
    assert list(found.linears) == list(expected.linears)
    assert found.schemes() == expected.schemes()
    assert found.kept == expected.kept
    tensors, wanted = dict(artifact_tensors(found)), dict(artifact_tensors(expected))
    assert tensors.keys() == wanted.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == wanted[key].dtype, key
        assert torch.equal(tensor, wanted[key]), key
    assert {linear.online_rotation for linear in found.linears.values()} == {
        linear.online_rotation for linear in expected.linears.values()
    }


@pytest.mark.parametrize(("name", "scheme", "settings"), CASES, ids=str)
def test_block_by_block_gives_what_the_whole_model_gives(
    name: str, scheme: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    held, lazy, how = prepared(name, scheme, settings)
    whole = quantize_model(
        held, how, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
    )
    found = blockwise(lazy, how, tmp_path)
    assert_same(found, whole)
    ids = torch.stack(token_rows([11, 11]))
    assert torch.equal(
        build_reference(found)(input_ids=ids).logits, build_reference(whole)(input_ids=ids).logits
    )


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "int4-weight-only"), ("gemma2", "float8"), ("gpt2", "int8"), ("mixtral", "w4a8")],
)
def test_block_by_block_keeps_the_norms_as_the_whole_model_does(
    name: str, scheme: str, tmp_path: Path
) -> None:
    held, lazy, how = prepared(name, scheme, {}, ["r2", "r4"])
    whole = quantize_model(
        held, how, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
    )
    found = blockwise(lazy, how, tmp_path)
    assert_same(found, whole)
    assert not load_artifact(tmp_path / "out").norms_folded
    stored = make_tiny(CONFIGS[name]()).state
    gains = [f"{norm}.weight" for norm in held.wiring.norm_names]
    assert all(torch.equal(found.floats[gain], stored[gain].float()) for gain in gains)


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "smoothquant:0.5"), ("llama", "awq:grid=4"), ("mixtral", "awq:grid=4")],
)
def test_smoothing_block_by_block_is_that_of_the_whole_model(
    name: str, method: str, tmp_path: Path
) -> None:
    """Scales of a block change nothing of what enters the next: both see the same float
    function.
    """
    held, lazy, how = prepared(name, "w4a8", {})
    chosen = smoothing_named(method)
    assert chosen is not None
    schemes = with_parameters(how.linears, held.wiring)
    search = chosen.needs_moment
    groups = groups_of(held.wiring, held.rotations, schemes, search=search)
    norms = held.wiring.norm_names[:-1]
    assert any(group.rotation for group in groups) == (method == "smoothquant:0.5")  # around R4
    # Mixtral's second one feeds experts, and a router, only
    assert {group.name for group in groups} >= set(norms)
    loop = forward_loop_over(length_batches(token_rows(), 4))
    statistics = observe_channels(materialize(held), groups, loop, moments=search)
    smoothed, _ = smooth(held, chosen, statistics, schemes)
    whole = quantize_model(smoothed, how, loop, PROVENANCE)
    found = blockwise(lazy, how, tmp_path, smoothing=chosen)
    assert found.smoothing.keys() == whole.smoothing.keys()
    for group, scale in whole.smoothing.items():
        # A smoothed block rounds differently in its last bits, and so does what enters the next
        # one.
        torch.testing.assert_close(found.smoothing[group], scale, rtol=1e-4, atol=0)
    for name, linear in found.linears.items():
        expected = whole.linears[name].input_scale
        assert linear.input_scale is not None
        assert expected is not None
        torch.testing.assert_close(linear.input_scale, expected, rtol=1e-4, atol=0)


def test_a_prefix_stands_before_every_block(tmp_path: Path) -> None:
    held, lazy, how = prepared("llama", "int8", {"kv": "int8", "overrides": {"lm_head": "int8"}})
    loop = forward_loop_over(length_batches(token_rows(), 4))
    whole = quantize_model(with_prefix(held, (5, 9)), how, loop, PROVENANCE)
    found = blockwise(with_prefix_blockwise(lazy, (5, 9)), how, tmp_path)
    assert_same(found, whole)
    assert found.prefix is not None
    assert whole.prefix is not None
    assert found.prefix.tokens == (5, 9)
    for layer, values in whole.prefix.values.items():
        assert torch.equal(found.prefix.values[layer], values)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe"])
def test_asym_sees_the_quantized_model(name: str, tmp_path: Path) -> None:
    """The last linear is calibrated on what it reads in the result: its input's amax there is that
    of its scale.
    """
    _, lazy, how = prepared(name, "int8", {})
    found = blockwise(lazy, how, tmp_path, asym=True)
    reference = build_reference(found)
    last = list(found.linears)[-1]
    largest = 0.0

    def look(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal largest
        rotated = args[0] if module.rotation is None else module.rotation.apply(args[0])
        largest = max(largest, float(rotated.abs().max()))

    reference.get_submodule(last).register_forward_pre_hook(look)
    for batch in length_batches(token_rows(), 4):
        reference(input_ids=batch.input_ids)
    scale = found.linears[last].input_scale
    assert scale is not None
    assert float(scale) * 127 == pytest.approx(largest, rel=1e-5)
    float_scale = blockwise(lazy, how, tmp_path / "float").linears[last].input_scale
    assert float_scale is not None
    assert float(float_scale) != pytest.approx(float(scale), rel=1e-4)


def test_weights_alone_need_no_batch(tmp_path: Path) -> None:
    held, lazy, how = prepared("llama", "int4-weight-only", {})
    (tmp_path / "out").mkdir()
    found = quantize_blockwise(lazy, how, [], PROVENANCE, tmp_path / "work", tmp_path / "out")
    assert_same(found, quantize_model(held, how, None, PROVENANCE))


@pytest.mark.parametrize("resumable", [True, False])
def test_hidden_states_that_fit_in_memory_are_written_only_for_a_later_run(
    resumable: bool, tmp_path: Path
) -> None:
    _, lazy, how = prepared("llama", "int8", {})
    blockwise(lazy, how, tmp_path, resumable=resumable)
    shards = json.loads((tmp_path / "work" / "journal.json").read_text())["shards"]
    assert bool(shards["block-00000"]["next_inputs"]) is resumable
