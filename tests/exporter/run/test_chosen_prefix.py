"""A prefix from the recipe to the report: chosen where it helps, refused where it cannot be, and in
place in everything that is compared.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from calib.artifact import load_artifact, load_prefix
from calib.capture.storage import Capture
from calib.errors import BackendError, CheckpointError, RecipeError
from calib.stats.massive import MASSIVE
from exporter.commands.evaluate import evaluate
from exporter.commands.export import calibrate, export
from exporter.commands.verify import verify
from exporter.recipe import Recipe, load_recipe
from exporter.run.capturing import captured
from exporter.run.destination import Destination
from exporter.run.inputs import open_inputs
from exporter.run.options import RunOptions
from exporter.run.quantizing import check_names
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import CAPTURE, WorkDir
from tests.checkpoints import VOCABULARY, write_checkpoint

FEW: dict[str, Any] = {
    "rotate": "none",
    "calibration.nsamples": 4,
    "calibration.seqlen": 48,
    "gate.nsamples": 2,
    "evaluation.nsamples": 2,
}
FACTOR = 4000.0


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2 in which the first token of every row is massive, whatever it is: one direction of
    the residual stream belongs to position 0, and one feature of the MLP reads nothing else.
    """
    folder = tmp_path_factory.mktemp("sink") / "gpt2"
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48
    )
    config.bos_token_id, config.eos_token_id = 0, 1
    write_checkpoint(folder, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    first = model.transformer.h[0]
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 0
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[0, 0] = 100
        first.ln_2.weight.fill_(1)
        first.ln_2.bias.zero_()
        first.mlp.c_fc.weight[0] = 0
        first.mlp.c_fc.weight[:, 0] = 0
        first.mlp.c_fc.weight[0, 0] = FACTOR
        first.mlp.c_fc.bias[0] = -2 * FACTOR  # what attention adds to that direction stays below

        # what is massive says nothing, as in a trained model, and the other features say much
        first.mlp.c_proj.weight[0] = 0
        first.mlp.c_proj.weight *= 8
        for layer in model.transformer.h:
            layer.attn.c_attn.weight[:, 64:] *= 1e-3
            layer.attn.c_attn.bias[64:] *= 1e-3
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


def few(model: str, **changes: Any) -> Recipe:
    values = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe(None, {**FEW, "model": model, **values})


def test_a_prefix_that_helps_is_found_kept_written_and_judged(sink: str, tmp_path: Path) -> None:
    result = export(few(sink), RunOptions(tmp_path / "out"))
    report = result.report
    assert report.status == "passed"
    assert report.prefix is not None
    assert len(report.prefix.tokens) == 1
    assert len(report.prefix.words) == 1
    worst = report.massive[0]
    assert worst.name == "transformer.h.0.mlp.c_proj"
    assert worst.ratio > MASSIVE
    assert worst.with_prefix is not None
    assert worst.with_prefix < MASSIVE

    # the gate saw the model with and without it, and it pays
    assert [(row.name, row.chosen) for row in report.gate] == [
        ("none", False),
        ("none + prefix", True),
        ("none + norms kept + prefix", False),
    ]
    without, with_it, _ = (row.kl for row in report.gate)
    assert without is not None
    assert with_it is not None
    assert with_it < without / 2

    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "a prefix of 1 token stands before every sequence" in card
    assert f"transformer.h.0.mlp.c_proj {worst.ratio:.0f} x" in card

    # what was written is read again, by the runtime alone and against the original
    again = verify(tmp_path / "out")
    assert again.status == "passed"
    assert again.prefix == report.prefix


def test_statistics_are_those_of_the_prefix_of_the_run(llama: str, tmp_path: Path) -> None:
    """A prefix is no parameter: the fingerprint of the model does not know it."""
    recipe = few(llama, rotate="r1", prefix="none")
    inputs, clock = open_inputs(recipe, Destination.of(recipe)), Stopwatch()
    rows = inputs.rows(clock).train
    shared = RunOptions(tmp_path, shared_capture=tmp_path / "shared")
    work = WorkDir(tmp_path / "work", recipe, resume=False)

    behind = captured(inputs, rows, shared, work, clock, [5])
    assert behind.provenance.prefix == (5,)
    for again in (shared, RunOptions(tmp_path, from_capture=tmp_path / "work" / CAPTURE)):
        kept = captured(inputs, rows, again, WorkDir(None, recipe, resume=False), clock, [5])
        assert kept.provenance == behind.provenance
    given = RunOptions(tmp_path, from_capture=tmp_path / "shared")
    with pytest.raises(CheckpointError, match=r"has the tokens \[5\] before every row.* no prefix"):
        captured(inputs, rows, given, work, clock)

    plain = captured(inputs, rows, shared, work, clock)
    assert plain.provenance.prefix == ()
    assert not torch.equal(plain.r1.covariance, behind.r1.covariance)
    # what a resume had is replaced, and what others share stays
    assert Capture.load(tmp_path / "work" / CAPTURE).provenance == plain.provenance
    assert Capture.load(tmp_path / "shared").provenance == behind.provenance


def test_an_artifact_keeps_its_prefix(sink: str, tmp_path: Path) -> None:
    calibrate(few(sink, prefix=2), RunOptions(tmp_path / "artifact"))
    artifact = load_artifact(tmp_path / "artifact")
    assert artifact.prefix is not None
    assert artifact.prefix.length == 2
    assert artifact.provenance.massive[0]["ratio"] > MASSIVE
    options = RunOptions(tmp_path / "out", from_artifact=tmp_path / "artifact")
    result = export(few(sink), options)
    assert result.report.status == "passed"
    assert result.report.prefix is not None
    assert result.report.prefix.tokens == list(artifact.prefix.tokens)

    # and a target that cannot have one says so before anything is written
    bundle = few(sink, backend="safetensors", target="modelopt")
    with pytest.raises(BackendError, match="--prefix 2: its readers own their KV cache"):
        export(bundle, RunOptions(tmp_path / "no", from_artifact=tmp_path / "artifact"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("smoothing", ["none", "smoothquant:0.5"])
def test_a_prefix_that_is_asked_for_is_there_whatever_it_is_worth(
    llama: str, tmp_path: Path, smoothing: str
) -> None:
    """Smoothing scales values, and those of the prefix with them."""
    recipe = few(llama, prefix=3, rotate="r1,r2,r3,r4", smoothing=smoothing)
    report = export(recipe, RunOptions(tmp_path / "out")).report
    assert report.status == "passed"
    assert report.prefix is not None
    assert len(report.prefix.tokens) == 3
    assert report.gate == []  # nothing else was to be compared
    assert verify(tmp_path / "out").status == "passed"


def test_a_float_model_with_a_prefix_is_exact(llama: str, tmp_path: Path) -> None:
    """Rung 2 holds the graph to 1e-5 of torch with that prefix, rung 1 torch to the original with
    it. What a random model makes of two more tokens (rung 3) is another question.
    """
    report = export(few(llama, prefix=2, scheme="float"), RunOptions(tmp_path / "out")).report
    judged = [row for row in report.parity if row.metric == "relative L2"]
    assert [row.rung for row in judged] == [1, 2, 2, 2, 2]
    assert all(row.bound == pytest.approx(1e-5) and row.passed for row in judged)


def test_auto_leaves_alone_what_has_no_massive_tokens(llama: str, tmp_path: Path) -> None:
    calibrate(few(llama), RunOptions(tmp_path / "out"))
    artifact = load_artifact(tmp_path / "out")
    assert artifact.prefix is None
    assert artifact.provenance.massive == ()


def test_what_a_target_cannot_have_is_said_and_left_out(
    sink: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = {"backend": "safetensors", "target": "modelopt", "scheme": "float8"}
    with caplog.at_level(logging.WARNING):
        result = export(few(sink, **bundle), RunOptions(tmp_path / "out", verify=False))
    assert result.report.prefix is None
    assert result.report.massive[0].with_prefix is None
    assert "which a prefix would take away, and target 'modelopt' cannot have one" in caplog.text

    with pytest.raises(BackendError, match="--prefix 1: its readers own their KV cache"):
        export(few(sink, prefix=1, **bundle), RunOptions(tmp_path / "no"))


@pytest.mark.parametrize("target", ["tripy", "tensorrt"])
def test_a_bundle_has_it_for_whoever_builds_the_network(
    llama: str, target: str, tmp_path: Path
) -> None:
    bundle = {"backend": "safetensors", "target": target, "scheme": "int8-weight-only"}
    recipe = few(llama, prefix=2, rotate="r1,r2,r3,r4", **bundle)
    report = export(recipe, RunOptions(tmp_path / "out")).report
    prefix = load_prefix(tmp_path / "out")
    assert prefix is not None
    assert report.prefix is not None
    assert list(prefix.tokens) == report.prefix.tokens
    assert len(prefix.tokens) == 2
    # what a random model makes of two more tokens (rung 3) is another question
    for judged in (report, verify(tmp_path / "out")):
        rows = [row for row in judged.parity if row.metric == "relative L2"]
        assert [row.rung for row in rows] == [1, 2, 2, 2, 2, 2]
        assert all(row.passed for row in rows)


def test_a_prefix_has_to_fit_into_the_positions(sink: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a prefix of 17 tokens does not fit: .* leaves 16 of"):
        calibrate(few(sink, prefix=17), RunOptions(tmp_path / "out"))
    with pytest.raises(RecipeError, match="layer-wise mode cannot smooth behind a prefix"):
        check_names(few(sink, prefix=1, layerwise__enabled=True, smoothing="smoothquant:0.5"))


def test_longer_rows_than_those_of_calibration_have_to_fit_as_well(
    sink: str, tmp_path: Path
) -> None:
    """64 positions, 3 of which the prefix takes."""
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("\n".join(f"a few words, row {index}" for index in range(12)))
    long.write_text("\n".join(f"more words than that, row {index} " * 40 for index in range(8)))
    texts = {"calibration__dataset": str(short), "evaluation__dataset": str(long)}
    recipe = few(sink, prefix=3, calibration__seqlen=64, calibration__layout="documents", **texts)
    with pytest.raises(RecipeError, match="a prefix of 3 tokens does not fit"):
        export(recipe, RunOptions(tmp_path / "out"))


def test_what_evaluates_counts_the_positions_of_the_prefix(sink: str, tmp_path: Path) -> None:
    """Learned positions end where they end."""
    text = tmp_path / "long.txt"
    text.write_text("many more words in a row than there are positions " * 40)
    export(few(sink, prefix=3), RunOptions(tmp_path / "out"))
    assert evaluate(str(tmp_path / "out"), str(text)).tokens > 64
    stated = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert stated["model"]["context_length"] == stated["search"]["max_length"] == 61


def test_frequencies_that_move_have_no_prefix(tmp_path: Path) -> None:
    """Its keys would keep those of short texts."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = str(write_checkpoint(tmp_path / "model", rope_parameters=rope))
    with pytest.raises(RecipeError, match="takes other frequencies for long texts"):
        calibrate(few(model, prefix=2), RunOptions(tmp_path / "out"))


def test_without_a_prefix_the_linear_that_hurts_gets_a_wider_input(
    sink: str, tmp_path: Path
) -> None:
    recipe = few(sink, prefix="none", rotate="auto")
    result = export(recipe, RunOptions(tmp_path / "out"))
    report = result.report
    assert report.status == "passed"
    chosen = next(row for row in report.gate if row.chosen)
    assert chosen.wider == 1
    assert chosen.kl is not None
    assert all(row.kl is not None and chosen.kl < row.kl / 2 for row in report.gate[:-1])
    # ONNX graphs have no scales per token
    assert report.layers.schemes["int8 weights per channel, float inputs"] == 1
    assert verify(tmp_path / "out").status == "passed"

    # and nothing of the kind where it is not wanted
    plain = few(sink, prefix="none", rotate="auto", widen="none")
    again = export(plain, RunOptions(tmp_path / "plain", verify=False)).report
    assert not any(row.wider for row in again.gate)
