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
from tests.tiny import (
    CONFIGS,
    PROVENANCE,
    VOCABULARY,
    fuse_tiny,
    make_tiny,
    relative_l2,
    token_rows,
)

GENERATED = 12
APPROXIMATED = 1e-3
"""Relative L2 of logits of two sessions in which weight-only linears round their inputs: the same
way, but from inputs whose last bits differ, so that some go to the other side."""


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


BUFFERS = ("grown", "shared")
TURNS = (token_rows((6,), seed=9)[0].tolist(), token_rows((4,), seed=8)[0].tolist())


@pytest.fixture(params=BUFFERS)
def conversing(
    request: pytest.FixtureRequest, export_of: Callable[[str], Exported], tmp_path: Path
) -> Exported:
    """The same model with either kind of cache; activations stay in float, so that logits can be
    compared.
    """
    made = export_of("block-diagonal")
    OnnxBackend().write(made.quantized, tmp_path, WriteOptions("ort", kv_buffer=request.param))
    return Exported(made.quantized, made.reference, tmp_path)


def generator(folder: Path, **options: Any) -> Any:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(**{"max_length": 40, "min_length": 40} | options)
    return og.Generator(model, params)


def first_turn(folder: Path) -> tuple[Any, list[int]]:
    """A generator after five tokens of an answer, and all tokens so far."""
    chat = generator(folder)
    chat.append_tokens(TURNS[0])
    for _ in range(5):
        chat.generate_next_token()
    return chat, [int(token) for token in chat.get_sequence(0)]


def last_logits(chat: Any) -> torch.Tensor:
    return torch.from_numpy(chat.get_logits().reshape(-1, VOCABULARY)[-1].copy())


def run(exported: Exported, ids: list[int], start: int, past: Any = None) -> Any:
    """rotq's own runner over ``ids``, which begin at ``start``."""
    runtime = OnnxBackend().load(exported.folder, "ort", exact=False)
    row, stop = torch.tensor(ids)[None], start + len(ids)
    mask, positions = torch.ones(1, stop, dtype=torch.long), torch.arange(start, stop)[None]
    return runtime.forward(row, mask, positions, past)


@pytest.mark.runtimes
def test_a_second_turn_goes_on_where_the_first_ended(conversing: Exported) -> None:
    """Asked for its logits, onnxruntime-genai runs the last token of the first turn too."""
    chat, before = first_turn(conversing.folder)
    chat.get_logits()
    chat.append_tokens(TURNS[1])
    wanted, _ = run(conversing, before + TURNS[1], 0)
    assert relative_l2(last_logits(chat), wanted[0, -1]) <= APPROXIMATED
    for _ in range(5):
        chat.generate_next_token()
    text = torch.tensor(before + TURNS[1])
    assert chat.get_sequence(0).tolist() == greedy(conversing, text, 5)


@pytest.mark.runtimes
def test_a_second_turn_at_once_lacks_the_last_token_of_the_first(conversing: Exported) -> None:
    """onnxruntime-genai counts that token and does not run it: zeros stand where its keys and
    values would, with either kind of cache, as in its own graphs.
    """
    chat, before = first_turn(conversing.folder)
    chat.append_tokens(TURNS[1])
    _, past = run(conversing, before[:-1], 0)
    lacking = [torch.nn.functional.pad(tensor, (0, 0, 0, 1)) for tensor in past]
    wanted, _ = run(conversing, TURNS[1], len(before), lacking)
    assert relative_l2(last_logits(chat), wanted[0, -1]) <= APPROXIMATED
    whole, _ = run(conversing, before + TURNS[1], 0)
    assert relative_l2(last_logits(chat), whole[0, -1]) > 10 * APPROXIMATED


@pytest.mark.runtimes
def test_a_turn_can_be_taken_back(conversing: Exported) -> None:
    chat, before = first_turn(conversing.folder)
    chat.rewind_to(len(TURNS[0]) + 2)
    for _ in range(5):
        chat.generate_next_token()
    assert chat.get_sequence(0).tolist()[: len(before)] == before


def searched(exported: Exported, ids: list[int], steps: int, beams: int) -> list[int]:
    """Beam search through rotq's own runner, every row run from its start."""
    end = exported.quantized.config["eos_token_id"]
    rows = [(0.0, ids)]
    for _ in range(steps):
        found = []
        for score, row in rows:
            logits = run(exported, row, 0)[0][0, -1]
            logits[end] = -torch.inf
            best = logits.log_softmax(-1).topk(beams)
            found += [
                (score + float(value), [*row, int(token)])
                for value, token in zip(best.values, best.indices, strict=True)
            ]
        rows = sorted(found, reverse=True)[:beams]
    return rows[0][1]


@pytest.mark.runtimes
def test_it_searches_with_beams(conversing: Exported) -> None:
    """onnxruntime-genai shares no memory then: a buffer without room must grow."""
    wanted = searched(conversing, TURNS[0], 6, beams=4)
    length = len(wanted)
    chat = generator(conversing.folder, num_beams=4, max_length=length, min_length=length)
    chat.append_tokens(TURNS[0])
    while not chat.is_done():
        chat.generate_next_token()
    assert chat.get_sequence(0).tolist() == wanted
    assert wanted != greedy(conversing, torch.tensor(TURNS[0]), 6)  # so that beams are seen at all


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
