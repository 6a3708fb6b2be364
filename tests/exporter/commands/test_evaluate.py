"""``rotq eval``: it measures the model that was named, and says in two lines where it cannot."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import transformers
from cli_support import ROOT
from safetensors.torch import load_file, save_file

from calib.errors import CheckpointError
from calib.measure.perplexity import model_logits, perplexity
from exporter.cli import main
from exporter.commands.evaluate import evaluate
from exporter.commands.inspect import inspect_folder
from exporter.commands.rotate import rotate
from exporter.commands.verify import verify
from exporter.recipe import RECIPE_FILE, load_recipe
from exporter.reporting.report import REPORT_FILE
from exporter.run.options import RunOptions
from exporter.source import embedded_folder, load_tokenizer, open_source
from tests.checkpoints import TINY, write_checkpoint


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma-2 whose attention scores are capped so low that it shows."""
    config = transformers.Gemma2Config(
        **TINY, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=0.5
    )
    folder = write_checkpoint(tmp_path_factory.mktemp("capped") / "model", config, seed=3)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "q_proj" in name or "k_proj" in name:
            tensors[name] *= 10  # scores far beyond the cap
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain_perplexity(folder: Path, attention: str) -> float:
    """What transformers itself gives for the first document of the embedded text."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    text = (embedded_folder() / "evaluation.txt").read_text(encoding="utf-8").splitlines()[0]
    row = torch.tensor(load_tokenizer(folder)(text)["input_ids"])
    window = TINY["max_position_embeddings"]
    return perplexity(model_logits(model.eval()), [row], window=window, stride=window).value


def test_the_caps_of_a_checkpoint_are_computed(capped: Path) -> None:
    expected = plain_perplexity(capped, "eager")
    # dropping the caps is another model, by far more than an order of summation explains
    assert abs(plain_perplexity(capped, "sdpa") / expected - 1) > 1e-3
    assert evaluate(str(capped), None, nsamples=1).perplexity == pytest.approx(expected, rel=1e-5)


def test_a_rotated_folder_is_measured_as_its_original(capped: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        None, {"model": str(capped), "scheme": "float", "evaluation.nsamples": 2, "device": "cpu"}
    )
    folder = rotate(recipe, RunOptions(tmp_path / "out")).output
    before, after = (evaluate(str(each), None, nsamples=1) for each in (capped, folder))
    assert after.perplexity == pytest.approx(before.perplexity, rel=1e-4)


def test_the_original_of_a_run_has_its_caps_too(capped: Path) -> None:
    source = open_source(load_recipe(None, {"model": str(capped)}))
    assert source.original("cpu").config._attn_implementation not in ("sdpa", "eager")


LOADERS = (
    "AutoModelForCausalLM.from_pretrained",
    "MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained",
)


def test_a_reference_says_how_far_predictions_are_apart(capped: Path, tmp_path: Path) -> None:
    same = evaluate(str(capped), None, reference=str(capped), nsamples=2).divergence
    assert same is not None
    assert (same.kl, same.top1, same.top5) == (0.0, 1.0, 1.0)

    other = write_checkpoint(tmp_path / "other", seed=5)
    plain, beside = (evaluate(str(each), None, nsamples=2) for each in (capped, other))
    found = evaluate(str(capped), None, reference=str(other), nsamples=2)
    assert found.perplexity == pytest.approx(plain.perplexity, rel=1e-12)
    assert found.divergence is not None
    assert found.divergence.perplexity == pytest.approx(beside.perplexity, rel=1e-12)
    assert found.divergence.kl > 0
    assert found.divergence.top1 <= found.divergence.top5


def test_several_sources_are_compared_in_one_table_and_one_chart(
    capped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_logging: None
) -> None:
    chart = tmp_path / "sizes.svg"
    given = [str(capped), "embedded", "--nsamples", "1"]
    assert main(["eval", *given, "--reference", str(capped), "--chart", str(chart)]) == 0
    table = capsys.readouterr().out
    assert "100.00%" in table
    assert "compared with" in table
    root = ElementTree.fromstring(chart.read_bytes())
    assert root.tag.endswith("svg")

    assert main(["eval", *given, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [each["source"] for each in results] == [str(capped), "embedded"]

    assert main(["eval", str(capped), "--chart", str(tmp_path / "sizes.pdf")]) == 1
    assert ".svg or .png" in capsys.readouterr().err


def test_there_is_one_loader_of_checkpoints() -> None:
    loaders = [
        path.relative_to(ROOT).as_posix()
        for package in ("calib", "exporter", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        if any(
            isinstance(node, ast.Call) and ast.unparse(node.func) in LOADERS
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]
    # the benchmarks are what transformers, and what peers, do alone
    own = "calib/network/original.py"
    assert sorted(loaders) == ["benchmarks/job_peer.py", "benchmarks/readers.py", own]


def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_not_made_up(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj"):
        evaluate(str(folder), None, nsamples=1)


DAMAGED = {
    "not JSON": "{",
    "of another kind": "[]",
    "incomplete": json.dumps({"status": "passed"}),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.usefixtures("clean_logging")
def test_a_damaged_report_is_two_lines_for_every_reader(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / REPORT_FILE).write_text(text)
    (tmp_path / RECIPE_FILE).write_text(load_recipe(None).to_yaml())
    for reader in (verify, inspect_folder, lambda folder: evaluate(str(folder), None)):
        with pytest.raises(CheckpointError, match="is not a complete export") as caught:
            reader(tmp_path)
        assert caught.value.hint == "export the model again"
    assert main(["eval", str(tmp_path), "-q"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert hint == "hint: export the model again"
