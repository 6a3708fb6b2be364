"""``rotq eval --tasks``: what lm-evaluation-harness finds in the runtime is what it finds in torch,
by its own model class, on tasks made here.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from calib.artifact import load_artifact
from calib.errors import DataError
from calib.measure.reference import build_reference
from exporter.cli import main
from exporter.commands import tasks
from exporter.commands.export import export
from exporter.commands.tasks import TasksResult, evaluate_tasks
from exporter.recipe import EMBEDDED
from exporter.run.options import RunOptions
from exporter.source import embedded_folder, load_tokenizer
from tests.few import few

harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")

CHOICE = """\
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{right}}}}"
doc_to_choice: "{{{{ends}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
TEXTS = """\
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{whole}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
WRITTEN = """\
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
KINDS = {"choice": CHOICE, "texts": TEXTS, "written": WRITTEN}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of the embedded model's own kind of text: which end is that of this beginning?"""
    root = tmp_path_factory.mktemp("tasks")
    lines = (embedded_folder() / "evaluation.txt").read_text(encoding="utf-8").splitlines()
    halves = [(line[:60], line[60:110]) for line in lines if len(line) > 120][:24]
    rows = [
        {
            "start": start,
            "ends": [end, halves[at - 1][1]],
            "right": 0,
            "whole": start + end,
            "written": end,
        }
        for at, (start, end) in enumerate(halves)
    ]
    data = root / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, text in KINDS.items():
        (root / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return root


def by_the_harness(model: Any, folder: Path, names: list[str]) -> dict[str, Any]:
    """What its own class for torch models gives."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(pretrained=model, tokenizer=load_tokenizer(embedded_folder()), batch_size=1)
    found: Any = lm_eval.simple_evaluate(
        wrapped,
        tasks=names,
        task_manager=TaskManager(include_path=str(folder)),
        bootstrap_iters=0,
    )
    return dict(found["results"])


def figure(result: TasksResult, task: str) -> float:
    (row,) = [row for row in result.figures if row.task == task]
    return row.value


@harness
@pytest.mark.runtimes
@pytest.mark.filterwarnings("ignore")
def test_a_float_export_scores_as_torch_does(folder: Path, tmp_path: Path) -> None:
    out = export(few(scheme="float", rotate="r1"), RunOptions(tmp_path / "out", verify=False))
    found = evaluate_tasks(str(out.output), ["choice", "texts"], include=folder)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype="float32")
    expected = by_the_harness(model, folder, ["choice", "texts"])
    assert found.runtime.startswith("ONNX Runtime")
    assert figure(found, "choice") == expected["choice"]["acc,none"]
    assert 0.5 < figure(found, "choice") <= 1  # it does know its own kind of text
    # float32 through two programs: the bar is 1e-5
    assert figure(found, "texts") == pytest.approx(
        expected["texts"]["word_perplexity,none"], rel=1e-5
    )


@harness
@pytest.mark.runtimes
@pytest.mark.filterwarnings("ignore")
def test_a_quantized_export_scores_as_its_reference_does(folder: Path, tmp_path: Path) -> None:
    options = RunOptions(tmp_path / "out", work_dir=tmp_path / "work", verify=False)
    out = export(few(scheme="int8", rotate="r1,r2,r4"), options)
    names = ["choice", "texts", "written"]
    found = evaluate_tasks(str(out.output), names, include=folder)
    reference: Any = build_reference(load_artifact(tmp_path / "work" / "artifact"))
    expected = by_the_harness(reference, folder, ["choice", "texts"])
    assert figure(found, "choice") == expected["choice"]["acc,none"]
    # log-likelihoods to 3e-3: roundings flip where sums are added in another order
    assert figure(found, "texts") == pytest.approx(
        expected["texts"]["word_perplexity,none"], rel=3e-3
    )
    assert {row.samples for row in found.figures} == {24}


@harness
@pytest.mark.runtimes
@pytest.mark.filterwarnings("ignore")
def test_the_command_prints_a_table_or_json(
    folder: Path, capsys: pytest.CaptureFixture[str], clean_logging: None
) -> None:
    given = ["eval", EMBEDDED, "--tasks", "choice,texts", "--tasks-folder", str(folder)]
    assert main([*given, "--limit", "4"]) == 0
    table = capsys.readouterr().out
    assert "word_perplexity" in table
    assert "acc" in table
    assert main([*given, "--limit", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["samples"] for row in document["figures"]} == {4}
    assert main(["eval", EMBEDDED, "--tasks", "choise", "--tasks-folder", str(folder)]) == 1
    assert "has no task 'choise'" in capsys.readouterr().err


def test_options_that_do_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], clean_logging: None
) -> None:
    assert main(["eval", EMBEDDED, "--limit", "4"]) == 2
    assert "--limit has no effect without --tasks" in capsys.readouterr().err
    assert main(["eval", EMBEDDED, "--tasks", "x", "--text", "wikitext2"]) == 2
    assert "--text has no effect with --tasks" in capsys.readouterr().err
    assert main(["eval", EMBEDDED, "--chat-template", "--shots", "0"]) == 2
    assert "--shots, --chat-template has no effect without --tasks" in capsys.readouterr().err
    assert main(["eval", EMBEDDED, "--tasks", "x", "--nsamples", "3", "--window", "64"]) == 2
    assert "--nsamples has no effect with --tasks" in capsys.readouterr().err


def test_a_missing_harness_is_said_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="not installed") as caught:
        evaluate_tasks(EMBEDDED, ["x"])
    assert caught.value.hint == tasks.INSTALL
