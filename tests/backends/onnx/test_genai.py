"""``genai_config.json``, and onnxruntime-genai generating text from written folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import GENAI_FILE
from backends.onnx.genai import genai_config
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.measure.reference import build_reference
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.schemes import scheme_named
from tests.backends.onnx.conftest import CASES, Exported
from tests.tiny import CONFIGS, PROVENANCE, fuse_tiny, make_tiny, token_rows

GENERATED = 12


def config_of(exported: Exported) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((exported.folder / GENAI_FILE).read_text())
    return found


def test_names_are_those_of_the_graph(exported: Exported) -> None:
    graph, decoder = exported.graph, config_of(exported)["model"]["decoder"]
    layers = range(decoder["num_hidden_layers"])
    inputs, outputs = decoder["inputs"], decoder["outputs"]
    pairs = [
        [inputs["past_key_names"] % layer, inputs["past_value_names"] % layer] for layer in layers
    ]
    fixed = [inputs[name] for name in ("input_ids", "attention_mask", "position_ids")]
    assert [value.name for value in graph.input] == [
        *fixed,
        *(name for pair in pairs for name in pair),
    ]
    pairs = [
        [outputs["present_key_names"] % layer, outputs["present_value_names"] % layer]
        for layer in layers
    ]
    assert [value.name for value in graph.output] == [
        outputs["logits"],
        *(name for pair in pairs for name in pair),
    ]
    past = next(value for value in graph.input if value.name == inputs["past_key_names"] % 0)
    axes = [dim.dim_value for dim in past.type.tensor_type.shape.dim]
    assert axes[1::2] == [decoder["num_key_value_heads"], decoder["head_size"]]


def test_the_generation_config_is_heard_before_the_config() -> None:
    config = CONFIGS["llama"]().to_dict() | {
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": None,
    }
    found = genai_config(
        config,
        {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "top_k": None},
        "g.onnx",
    )
    assert found["model"]["eos_token_id"] == [2, 7]
    assert found["model"]["bos_token_id"] == 1
    assert found["model"]["pad_token_id"] == 2  # none is named: what ends a text pads it
    assert found["search"]["do_sample"] is True
    assert found["search"]["temperature"] == 0.6
    assert "top_k" not in found["search"]
    assert found["search"]["past_present_share_buffer"] is False
    assert (
        found["search"]["max_length"]
        == found["model"]["context_length"]
        == config["max_position_embeddings"]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_a_config(name: str) -> None:
    config = CONFIGS[name]().to_dict()
    found = genai_config(config, {}, "model.onnx")["model"]
    assert found["vocab_size"] == config["vocab_size"]
    assert found["decoder"]["num_hidden_layers"] > 0
    json.dumps(found, allow_nan=False)


def greedy(exported: Exported, ids: torch.Tensor, steps: int) -> list[int]:
    """The token of the largest logit, over and over, through rotq's own runner as a user's session
    computes.

    Never the one that ends a text: asked for a least length, onnxruntime-genai leaves it out as
    well.
    """
    end = exported.quantized.config.get("eos_token_id")
    runtime = OnnxBackend().load(exported.folder, "ort", exact=False)
    found, entering, past = ids[None], ids[None], None
    for _ in range(steps):
        length = found.shape[1]
        positions = torch.arange(length - entering.shape[1], length)[None]
        logits, past = runtime.forward(
            entering, torch.ones(1, length, dtype=torch.long), positions, past
        )
        if end is not None and end < logits.shape[-1]:
            logits[..., end] = -torch.inf
        entering = logits[:, -1].argmax(-1, keepdim=True)
        found = torch.cat([found, entering], dim=1)
    return found[0].tolist()


def generated(folder: Path, ids: list[int], steps: int) -> list[int]:
    """What onnxruntime-genai makes of the same tokens."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + steps, min_length=len(ids) + steps)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.runtimes
@pytest.mark.parametrize("name", CASES)
def test_it_generates_what_the_runner_generates(
    name: str, export_of: Callable[[str], Exported]
) -> None:
    exported = export_of(name)
    ids = token_rows((6,), seed=9)[0]
    assert generated(exported.folder, ids.tolist(), GENERATED) == greedy(exported, ids, GENERATED)


@pytest.mark.runtimes
@pytest.mark.parametrize(
    "options",
    [
        WriteOptions("ort", logits="last"),
        WriteOptions("ort", max_shard_bytes=40_000),
        WriteOptions("ort", kv_buffer="shared"),
    ],
    ids=["last", "shards", "buffer"],
)
def test_it_generates_from_other_ways_to_write(
    llama: Exported, tmp_path: Path, options: WriteOptions
) -> None:
    OnnxBackend().write(llama.quantized, tmp_path, options)
    ids = token_rows((6,), seed=9)[0]
    assert generated(tmp_path, ids.tolist(), GENERATED) == greedy(llama, ids, GENERATED)


@pytest.mark.runtimes
def test_it_generates_from_a_quantized_cache(tmp_path: Path) -> None:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()))
    plan = resolve(scheme_named("int8"), fused.wiring, kv="int8")
    quantized = quantize_model(
        fused, plan, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
    )
    OnnxBackend().write(quantized, tmp_path, WriteOptions("ort"))
    ids = token_rows((6,), seed=9)[0]
    case = Exported(quantized, build_reference(quantized), tmp_path)
    assert generated(tmp_path, ids.tolist(), GENERATED) == greedy(case, ids, GENERATED)
