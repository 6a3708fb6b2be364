"""The parity check over any backend: what it judges, by which bound, and what it says where nothing
can be run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.architectures import wiring_of
from exporter.commands.export import export
from exporter.commands.verify import verify
from exporter.parity.passes import steady_length
from exporter.parity.subject import chosen_rows
from exporter.recipe import Recipe, load_recipe
from exporter.reporting.report import ParityRow, Report
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint
from tests.tiny import CONFIGS
from tests.torch_backend import install

FEW: dict[str, Any] = {
    "backend": "torch",
    "rotate": "none",
    "calibration.nsamples": 4,
    "calibration.seqlen": 48,
    "evaluation.nsamples": 3,
}


@pytest.fixture(autouse=True)
def torch_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    install(tmp_path / "site", monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


def few(model: str, **changes: Any) -> Recipe:
    return load_recipe(
        None, {**FEW, "model": model, **{key.replace("__", "."): v for key, v in changes.items()}}
    )


def exported(recipe: Recipe, folder: Path) -> Report:
    return export(recipe, RunOptions(folder)).report


def found(report: Report, name: str, metric: str = "relative L2") -> ParityRow:
    rows = [row for row in report.parity if name in row.name and row.metric == metric]
    assert len(rows) == 1, [row.name for row in report.parity]
    return rows[0]


END_TO_END = ("prefill, exact", "prefill, default", "decode with cache", "left-padded")


@pytest.mark.parametrize(
    "scheme", ["int8", "int8-weight-only", "int8-dynamic", "float8-dynamic", "float"]
)
def test_a_runtime_that_computes_what_the_artifact_says_passes(
    model: str, tmp_path: Path, scheme: str
) -> None:
    report = exported(few(model, scheme=scheme, target="own", dtype="float32"), tmp_path / "out")
    assert [row.name for row in report.parity if row.passed is False] == []
    assert report.status == "passed"
    for name in END_TO_END:
        row = found(report, name)
        assert row.measured is not None
        assert row.measured < 1e-5
        assert row.runtime == "torch, for tests"
    assert verify(tmp_path / "out").status == "passed"


def test_a_mode_with_a_note_is_reported_and_one_without_is_judged(
    model: str, tmp_path: Path
) -> None:
    report = exported(few(model, scheme="int8-weight-only"), tmp_path / "one")
    default = found(report, "prefill, default")
    assert (default.passed, default.note) == (None, "rounds inputs of its own accord")
    assert found(report, "prefill, exact").passed
    judged = found(exported(few(model, scheme="int8"), tmp_path / "two"), "prefill, default")
    assert (judged.passed, judged.note) == (True, "")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scheme", ["int8", "int4-weight-only", "float"])
def test_a_short_dtype_is_held_to_twice_what_the_naive_path_loses(
    model: str, tmp_path: Path, scheme: str, dtype: str
) -> None:
    report = exported(few(model, scheme=scheme, dtype=dtype, target="own"), tmp_path / "out")
    assert (report.status, report.dtype) == ("passed", dtype)
    naive = found(report, "naive floor").measured
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert naive is not None
    # of the order of one rounding, and of nothing that a wrong scale makes
    assert eps / 10 < naive < 100 * eps
    for name in END_TO_END:
        row = found(report, name)
        assert row.bound == (None if row.note else pytest.approx(2 * naive))
    fold = found(report, "original float vs rotated")
    assert fold.passed
    assert fold.bound is not None
    assert fold.bound < 100 * eps
    if scheme != "float":
        linear = found(report, "each linear")
        assert linear.bound is not None
        assert linear.measured is not None
        assert linear.bound < 10 * eps
        # this runtime *is* the naive path
        assert linear.bound == pytest.approx(2 * linear.measured)


@pytest.mark.parametrize("target", ["half", "own"])
def test_a_scale_lost_on_the_way_fails_in_every_dtype(
    model: str, tmp_path: Path, target: str
) -> None:
    recipe = few(model, scheme="int8-weight-only", backend="wrong", target=target)
    report = exported(recipe, tmp_path / "out")
    assert report.status == "failed"
    assert found(report, "each linear").passed is False
    assert "down_proj" in found(report, "each linear").note
    assert found(report, "prefill, exact").passed is False
    stored = found(report, "quantized linears, stored", "altered")
    assert (stored.measured, stored.passed) == (1, False)
    assert "down_proj" in stored.note

    # what is read from the file now computes what the file says, which is not what was calibrated
    again = verify(tmp_path / "out")
    assert found(again, "each linear").passed
    assert found(again, "quantized linears, stored", "altered") == stored
    assert again.status == "failed"


def test_what_is_stored_in_float_is_held_against_the_rotated_model(
    model: str, tmp_path: Path
) -> None:
    """A token that none of the texts holds: no other rung sees it."""
    right = exported(few(model, target="own"), tmp_path / "right")
    row = found(right, "float tensors, stored", "altered")
    assert (row.measured, row.passed) == (0, True)

    report = exported(few(model, target="own", backend="wrong-embedding"), tmp_path / "out")
    for status in (report, verify(tmp_path / "out")):
        row = found(status, "float tensors, stored", "altered")
        assert (row.measured, row.passed) == (1, False)
        assert "embed_tokens" in row.note
        assert status.status == "failed"


def test_a_report_that_kept_no_checksums_says_so(model: str, tmp_path: Path) -> None:
    report = exported(few(model, target="own"), tmp_path / "out")
    assert report.stored
    report.model_copy(update={"stored": {}}).save(tmp_path / "out")
    row = found(verify(tmp_path / "out"), "quantized linears, stored", "altered")
    assert row.passed is None
    assert "kept no checksums" in row.note


def test_a_runtime_that_is_missing_leaves_the_folder_unverified_with_the_reason(
    model: str, tmp_path: Path
) -> None:
    report = exported(few(model, scheme="int8", target="absent"), tmp_path / "out")
    assert report.status == "unverified"
    assert found(report, "original float vs rotated").passed
    skipped = [row for row in report.parity if row.measured is None]
    assert {row.note for row in skipped} == {"not run: its runtime is not installed"}
    assert len([row for row in skipped if row.rung == 2]) == 1 + len(END_TO_END)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not verified" in card
    assert "its runtime is not installed" in card


def test_logits_of_the_last_token_are_compared_where_there_are_no_others(
    model: str, tmp_path: Path
) -> None:
    report = exported(
        few(model, scheme="int8", logits="last", target="own", dtype="float32"), tmp_path / "out"
    )
    assert report.status == "passed"
    for name in END_TO_END:
        assert found(report, name).passed
    everything = exported(
        few(model, scheme="int8", target="own", dtype="float32"), tmp_path / "all"
    )
    ratios = [found(each, "exported", "perplexity ratio").measured for each in (report, everything)]
    # the same predictions, token by token from the cache
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)


def test_a_quantized_cache_is_rounded_on_the_way_and_held_to_a_floor(
    model: str, tmp_path: Path
) -> None:
    report = exported(
        few(model, scheme="int8-weight-only", kv="int8", target="own", dtype="float32"),
        tmp_path / "out",
    )
    assert report.status == "passed"
    assert report.layers.cache == "int8"
    assert found(report, "split-sum floor").measured is not None
    assert verify(tmp_path / "out").status == "passed"  # the cache is read back


def test_linears_that_were_warned_of_may_stay_unfused_and_others_may_not(
    model: str, tmp_path: Path
) -> None:
    recipe = few(model, scheme="int8", overrides={"*.0.mlp.*": "w4a8"}, target="plain")
    report = exported(recipe, tmp_path / "out")
    row = found(report, "dequantize", "unfused")
    assert (row.passed, row.measured) == (True, 0)
    assert "3 not fused, as warned" in row.note
    assert report.warnings == [
        "3 linears with int4 weights in blocks of 128, int8 inputs per tensor: int4 weights are"
        " unpacked on every run"
    ]
    assert report.warnings[0] in (tmp_path / "out" / "README.md").read_text()
    report = exported(recipe.model_copy(update={"target": "half"}), tmp_path / "silent")
    row = found(report, "dequantize", "unfused")
    assert (row.passed, row.measured, report.status) == (False, 3, "failed")
    assert "not fused: model.layers.0.mlp.gate_proj" in row.note


def test_a_config_that_the_backend_wrote_is_kept_and_read_without_what_is_its_own(
    model: str, tmp_path: Path
) -> None:
    exported(few(model, scheme="int8-weight-only", target="own"), tmp_path / "out")
    assert "quantization_config" in (tmp_path / "out" / "config.json").read_text()
    exported(few(model, scheme="int8-weight-only", target="plain"), tmp_path / "other")
    plain = json.loads((tmp_path / "other" / "config.json").read_text())
    assert "quantization_config" not in plain
    assert plain["rope_theta"] == plain["rope_parameters"]["rope_theta"]  # transformers 4
    assert verify(tmp_path / "out").status == "passed"


@pytest.mark.parametrize(
    ("rope", "steady"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "yarn", "factor": 4.0}, None),
        ({"rope_type": "dynamic", "factor": 4.0}, 64),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, 32),
    ],
)
def test_texts_are_compared_where_their_length_changes_nothing(
    rope: dict[str, Any], steady: int | None
) -> None:
    config = CONFIGS["llama"]().to_dict()
    rope = rope | {"rope_theta": 1e4}
    if rope["rope_type"] in ("longrope", "yarn"):
        rope["original_max_position_embeddings"] = 32
    found = wiring_of(config | {"rope_parameters": rope}).config
    assert steady_length(found) == steady


def test_rows_of_the_exact_rungs_are_the_longest_and_those_with_the_most_new_tokens() -> None:
    long, same, other, more = (
        torch.tensor(ids) for ids in ([1, 1, 1, 1, 1], [1, 1, 1, 1], [2, 3, 2, 3], [4, 5, 6, 7])
    )
    rows = [same, other, long, more]
    assert [row.tolist() for row in chosen_rows(rows, tokens=9, least=1)] == [
        long.tolist(),
        more.tolist(),
    ]
    assert [row.tolist() for row in chosen_rows(rows, tokens=1, least=3)] == [
        other.tolist(),
        long.tolist(),
        more.tolist(),
    ]
    # no more than there are, in their order
    assert all(map(torch.equal, chosen_rows(rows, tokens=99), rows))
