"""Text that is too short or too little: refused before the model is loaded, or warned of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from calib.errors import DataError
from exporter.cli.number_options import DataFlags, EvalDataFlag
from exporter.cli.overrides import overrides
from exporter.commands.export import export, run_capture
from exporter.planning.plan import plan
from exporter.recipe import load_recipe
from exporter.reporting.summary import calibration_words
from exporter.run.calibration_text import few_tokens, widest_input
from exporter.run.destination import Destination
from exporter.run.inputs import open_inputs
from exporter.run.options import RunOptions
from exporter.source import open_source, read_rows
from tests.checkpoints import write_checkpoint
from tests.exporter.cli_support import sample_report

STORY = "once upon a time there was a little girl. she went to the park with her mum. "


@pytest.mark.parametrize("run", [export, run_capture])
@pytest.mark.parametrize(
    ("name", "content", "changes", "said"),
    [
        ("short.txt", "the dog.\nthe cat.\n", {}, "too short"),
        ("one.jsonl", json.dumps({"text": STORY * 40}), {}, "too few for three splits"),
        ("chat.jsonl", json.dumps({"messages": [{"role": "user"}]}), {}, "no chat template"),
        ("missing.txt", None, {}, "does not exist"),
        ("x.jsonl", "{}", {"calibration.column": "body"}, "no field 'body'"),
    ],
)
def test_unusable_text_is_refused_before_the_model_is_loaded(
    run: Any,
    name: str,
    content: str | None,
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights were looked at")

    monkeypatch.setattr("exporter.source.fuse", loaded)
    monkeypatch.setattr("exporter.source.Source.original", loaded)
    if content is not None:
        (tmp_path / name).write_text(content)
    recipe = load_recipe(None, {"calibration.dataset": str(tmp_path / name), **changes})
    with pytest.raises(DataError, match=said) as caught:
        run(recipe, RunOptions(tmp_path / "out"))
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out").exists()


TOKENS = json.dumps({"input_ids": [3, 4, 5]})


@pytest.mark.parametrize(
    ("name", "content", "column", "said", "hint"),
    [
        ("text.csv", "text\na\n", None, "file of type .csv", "parquet"),
        ("text.jsonl.gz", "", None, "file of type .gz", "gunzip"),
        ("text.json", "[]", None, "file of type .json", "jsonl"),
        ("folder", None, None, "it is a folder", ".txt"),
        ("ids.jsonl", TOKENS, None, "no field 'text' .it has: input_ids", "--calib-column"),
        ("ids.jsonl", TOKENS, "input_ids", "holds token ids, not text", "own tokenizer"),
        ("body.jsonl", '{"body": "a"}', None, "no field 'text' .it has: body", "--calib-column"),
        ("notes.jsnl", None, None, "does not exist", "notes.jsonl"),
        ("nothing.csv", None, None, "does not exist", "--calib-dataset"),
        ("data/note.txt", None, None, "does not exist", "Did you mean 'data/notes.txt'"),
        ("data/notes", None, None, "does not exist", "Did you mean 'data/notes.txt'"),
        ("pipe.jsonl", None, None, "no regular file", "--calib-dataset"),
        ("empty.txt", "\n\n", None, "holds no text", "document"),
        ("bad.parquet", "PAR1", None, "parquet", ""),
    ],
)
@pytest.mark.parametrize("eval_too", [False, True])
def test_text_is_looked_at_before_anything_of_the_model(
    name: str,
    content: str | None,
    column: str | None,
    said: str,
    hint: str,
    eval_too: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("data").mkdir()
    Path("data/notes.txt").write_text("a\n")
    Path("notes.jsonl").write_text("{}\n")
    os.mkfifo("pipe.jsonl")
    if content is not None:
        Path(name).write_text(content)
    part = "evaluation" if eval_too else "calibration"
    missing = {"model": str(tmp_path / "no-model"), f"{part}.column": column}
    recipe = load_recipe(None, {**missing, f"{part}.dataset": name})
    for run in (plan, export):
        with pytest.raises(DataError, match=said) as caught:
            run(recipe, RunOptions(tmp_path / "out"))
        assert hint in str(caught.value.hint)


def test_the_embedded_text_stays_documents_and_lines_become_windows(tmp_path: Path) -> None:
    def split(**changes: Any) -> Any:
        recipe = load_recipe(None, {"calibration.nsamples": 8, **changes})
        source = open_source(recipe)
        return read_rows(recipe, source.tokenizer, source.config)

    assert split().layout == "documents"
    file = tmp_path / "lines.txt"
    file.write_text("".join(f"{i} {STORY}\n\n" for i in range(400)))
    auto = split(**{"calibration.dataset": str(file), "calibration.seqlen": 256})
    assert auto.layout == "windows"
    parts = [{tuple(row.tolist()) for row in p} for p in (auto.train, auto.gate, auto.evaluation)]
    assert {len(row) for part in parts for row in part} == {256}
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert len({row[0] for part in parts for row in part}) == 1  # <s>, in every window


def test_options_reach_the_recipe() -> None:
    flags = DataFlags(calib_dataset="a.jsonl", calib_column="body", calib_layout="windows")
    found = load_recipe(None, overrides(flags, EvalDataFlag("b.jsonl", "title")))
    assert (found.calibration.column, found.calibration.layout) == ("body", "windows")
    assert (found.evaluation.dataset, found.evaluation.column) == ("b.jsonl", "title")


def test_few_tokens_matter_where_second_moments_are_estimated() -> None:
    assert few_tokens("gptq", "none", 999, 100) is not None
    assert few_tokens("gptq", "none", 1000, 100) is None
    assert few_tokens("rtn", "none", 1, 100) is None
    assert few_tokens("rtn", "smoothquant:0.5", 1, 100) is None
    found = few_tokens("rtn", "awq", 250, 100)
    assert found is not None
    assert "250 calibration tokens are 2.5 for each of the 100 input channels" in found
    assert widest_input(open_source(load_recipe(None))) == 704


def test_the_summary_says_tokens_for_each_channel() -> None:
    words = calibration_words(sample_report().calibration)
    assert words == (
        "128 rows, 60,000 tokens (85.2 for each of the 704 input channels of the widest linear)"
    )


def test_the_embedded_text_is_named_for_a_model_of_ones_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = load_recipe(None, {"model": str(write_checkpoint(tmp_path / "model"))})
    for recipe, said in ((own, True), (load_recipe(None), False)):
        caplog.clear()
        open_inputs(recipe, Destination.of(recipe))
        assert ("the calibration text is the embedded one" in caplog.text) is said
