"""What an export writes when left to itself, against the float model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.commands.export import export
from exporter.parity.behaviour import REPETITION_BOUND, STEPS, common_length, repetition
from exporter.recipe import EMBEDDED, load_recipe
from exporter.reporting.report import ParityRow, Report
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint
from tests.torch_backend import install

FEW: dict[str, Any] = {
    "target": "own",
    "dtype": "float32",
    "rotate": "none",
    "scheme": "float",
    "calibration.nsamples": 1,
    "calibration.seqlen": 48,
    "evaluation.nsamples": 4,
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def torch_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    install(tmp_path / "site", monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


def exported(model: str, folder: Path, backend: str = "torch", **changes: Any) -> Report:
    recipe = load_recipe(None, {**FEW, "model": model, "backend": backend, **changes})
    return export(recipe, RunOptions(folder)).report


def behaviour(report: Report) -> dict[str, ParityRow]:
    rows = [row for row in report.parity if row.name.startswith("greedy")]
    assert all((row.rung, row.runtime) == (3, "torch, for tests") for row in rows)
    return {row.metric: row for row in rows}


def test_a_float_export_writes_what_the_float_model_does(tmp_path: Path) -> None:
    found = behaviour(exported(EMBEDDED, tmp_path / "out"))
    parted = found["tokens until they part"]
    assert (parted.measured, parted.bound, parted.passed) == (STEPS, None, None)
    assert parted.note == (
        f"4 prompts of held-out text, continued by {STEPS} tokens; 4 of them the same to the end"
    )
    repeated = found["repeated 4-grams, difference"]
    assert (repeated.measured, repeated.bound, repeated.passed) == (0, REPETITION_BOUND, True)


@pytest.mark.parametrize("logits", ["all", "last"])
def test_a_decoder_that_repeats_fails_whatever_its_perplexity(logits: str, tmp_path: Path) -> None:
    report = exported(EMBEDDED, tmp_path / "out", "repeats", logits=logits)
    repeated = behaviour(report)["repeated 4-grams, difference"]
    assert (repeated.passed, report.status) == (False, "failed")
    assert repeated.note.endswith(f"-> {1 - 1 / (STEPS - 3):.3f}")  # one 4-gram, over and over
    parted = behaviour(report)["tokens until they part"].measured
    assert parted is not None
    assert 1 <= parted < STEPS  # the first token is of the prompt's own pass
    if logits == "all":
        (ratio,) = [row for row in report.parity if row.metric == "perplexity ratio"]
        assert ratio.passed
        assert ratio.measured == pytest.approx(1, abs=1e-5)


def test_it_is_not_judged_where_there_is_nothing_to_judge_by(model: str, tmp_path: Path) -> None:
    """A random model writes what the last bits of its logits say; three prompts are too few."""
    untrained = exported(model, tmp_path / "untrained", "repeats")
    few = exported(EMBEDDED, tmp_path / "few", "repeats", **{"evaluation.nsamples": 3})
    for report in (untrained, few):
        repeated = behaviour(report)["repeated 4-grams, difference"]
        assert repeated.measured is not None
        assert repeated.measured > REPETITION_BOUND
        assert (repeated.bound, repeated.passed) == (None, None)


def test_a_chat_model_is_asked_as_one(model: str, tmp_path: Path) -> None:
    chat = write_checkpoint(tmp_path / "chat")
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    found = behaviour(exported(str(chat), tmp_path / "out"))
    parted = found["tokens until they part"]
    assert "8 prompts through the chat template" in parted.note
    assert parted.measured == STEPS  # questions of several lengths, padded to one


def test_continuations_end_where_the_model_does(tmp_path: Path) -> None:
    """16 tokens of a prompt and 20 positions: 4 can follow; of 18, none that show anything."""
    short = str(write_checkpoint(tmp_path / "short", max_position_embeddings=20))
    found = behaviour(exported(short, tmp_path / "out"))
    assert "continued by 4 tokens" in found["tokens until they part"].note
    shorter = str(write_checkpoint(tmp_path / "shorter", max_position_embeddings=18))
    assert behaviour(exported(shorter, tmp_path / "none")) == {}


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        ([1, 2, 3], 0),
        (list(range(32)), 0),
        ([7] * 32, 1 - 1 / 29),
        ([1, 2, 3, 4] * 8, 1 - 4 / 29),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 - 5 / 6),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(
    tokens: list[int], share: float
) -> None:
    assert repetition(tokens) == pytest.approx(share)


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [([], [], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([3], [4], 0)],
)
def test_texts_part_at_the_first_difference(one: list[int], other: list[int], length: int) -> None:
    assert common_length(one, other) == length
