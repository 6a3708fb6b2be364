"""Several targets from one calibration, artifacts in other dtypes, and what is refused before the
long job.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.rules import Limits
from calib.artifact import load_artifact
from calib.errors import BackendError, OutputError, RotqError
from exporter.commands.export import calibrate, export
from exporter.commands.verify import verify
from exporter.output import LIST_FILE, sha256_tree
from exporter.planning.plan import plan
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe
from exporter.reporting.report import REPORT_FILE, Report
from exporter.run.calibrating import Calibrating
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint
from tests.torch_backend import OPTIONS, WEIGHTS, TorchBackend, install

FEW: dict[str, Any] = {
    "backend": "torch",
    "rotate": "none",
    "calibration.nsamples": 4,
    "calibration.seqlen": 48,
    "evaluation.nsamples": 2,
}


@pytest.fixture(autouse=True)
def torch_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    install(tmp_path / "site", monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


def few(model: str, *targets: str, **changes: Any) -> Recipe:
    values = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe(None, {**FEW, "model": model, "target": list(targets) or None, **values})


def test_every_target_gets_a_complete_folder_from_one_calibration(
    model: str, tmp_path: Path
) -> None:
    recipe = few(model, "plain", "own", scheme="int8")
    result = export(recipe, RunOptions(tmp_path / "out"))
    assert result.folders == {target: tmp_path / "out" / target for target in ("plain", "own")}
    for target, folder in result.folders.items():
        report = Report.load(folder)
        assert report == result.reports[target]
        assert (report.target, report.status) == (target, "passed")
        assert report.checksums == sha256_tree(folder, exclude=(REPORT_FILE, LIST_FILE))
        assert {
            "README.md",
            "config.json",
            "tokenizer.json",
            RECIPE_FILE,
        } <= report.checksums.keys()
        assert load_recipe(folder / RECIPE_FILE).targets == (target,)
    weights = [
        folder / WEIGHTS / "quantized_model.safetensors" for folder in result.folders.values()
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert verify(tmp_path / "out" / "own").status == "passed"
    repeated = load_recipe(tmp_path / "out" / RECIPE_FILE)
    assert repeated == recipe
    export(repeated, RunOptions(tmp_path / "out", overwrite=True, verify=False))
    alone = few(model, "own", scheme="float")
    export(alone, RunOptions(tmp_path / "out" / "own", overwrite=True, verify=False))


def test_one_target_is_the_folder_itself(model: str, tmp_path: Path) -> None:
    result = export(few(model, "own", scheme="float"), RunOptions(tmp_path / "out", verify=False))
    assert result.folders == {"own": tmp_path / "out"}
    assert result.report.target == "own"


def test_either_all_targets_are_written_or_none(model: str, tmp_path: Path) -> None:
    recipe = few(model, "plain", "own", scheme="float", max_shard_size="10B")
    with pytest.raises(BackendError, match="its shards are larger"):
        export(recipe, RunOptions(tmp_path / "out", verify=False))
    assert not list(tmp_path.glob("*out*"))


def test_targets_of_two_dtypes_need_a_dtype_or_an_artifact(model: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="plain in float32, half in float16") as caught:
        export(few(model, "plain", "half"), RunOptions(tmp_path / "out"))
    assert "--dtype" in str(caught.value.hint)
    assert "--from-artifact" in str(caught.value.hint)
    result = export(
        few(model, "plain", "half", dtype="float16"), RunOptions(tmp_path / "out", verify=False)
    )
    assert {report.dtype for report in result.reports.values()} == {"float16"}


def test_one_artifact_serves_targets_of_every_dtype(model: str, tmp_path: Path) -> None:
    calibrate(few(model, "plain", scheme="int8"), RunOptions(tmp_path / "artifact"))
    recipe = few(model, "plain", "half", "own")
    result = export(recipe, RunOptions(tmp_path / "out", from_artifact=tmp_path / "artifact"))
    assert {target: report.dtype for target, report in result.reports.items()} == {
        "plain": "float32",
        "half": "float16",
        "own": "float32",
    }
    assert {report.status for report in result.reports.values()} == {"passed"}
    made = load_artifact(tmp_path / "artifact")
    half = load_artifact(tmp_path / "out" / "half" / WEIGHTS)
    for name, linear in half.linears.items():
        assert torch.equal(linear.weight, made.linears[name].weight)
        assert torch.equal(linear.weight_scale, made.linears[name].weight_scale.half())
    assert verify(tmp_path / "out" / "half").status == "passed"
    # repeating the run from the model, the target without a dtype has to be told the artifact's
    assert load_recipe(tmp_path / "out" / "own" / RECIPE_FILE).dtype == "float32"
    assert load_recipe(tmp_path / "out" / "half" / RECIPE_FILE).dtype == "auto"


def test_the_dtype_of_the_checkpoint_is_that_of_a_target_without_one(
    model: str, tmp_path: Path
) -> None:
    import transformers

    short = transformers.AutoModelForCausalLM.from_pretrained(model).to(torch.bfloat16)
    short.save_pretrained(tmp_path / "short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "short" / name).write_bytes((Path(model) / name).read_bytes())
    options = RunOptions(tmp_path / "out", verify=False)
    assert (
        export(few(str(tmp_path / "short"), "own", scheme="float"), options).report.dtype
        == "bfloat16"
    )


def test_a_resume_for_a_target_of_another_dtype_is_refused(model: str, tmp_path: Path) -> None:
    calibrate(
        few(model, "plain", scheme="float"),
        RunOptions(tmp_path / "one", work_dir=tmp_path / "work"),
    )
    resumed = RunOptions(tmp_path / "two", work_dir=tmp_path / "work", resume=True, verify=False)
    with pytest.raises(OutputError, match="dtype was float32 and is now float16"):
        export(few(model, "half", scheme="float"), resumed)
    again = export(few(model, "own", scheme="float", logits="last"), resumed)
    assert again.report.dtype == "float32"
    assert "calibrate" not in again.report.seconds


def told(folder: Path) -> tuple[str, str]:
    """What the backend was told of keys and values, and what the recipe in its folder says."""
    return json.loads((folder / OPTIONS).read_text())["kv_buffer"], load_recipe(
        folder / RECIPE_FILE
    ).kv_buffer


def test_how_keys_and_values_are_kept_concerns_writing_alone(model: str, tmp_path: Path) -> None:
    kept = RunOptions(tmp_path / "artifact", work_dir=tmp_path / "work")
    calibrate(few(model, "plain", scheme="int8", kv_buffer="shared"), kept)
    grown, shared = (
        few(model, "plain", scheme="int8"),
        few(model, "plain", scheme="int8", kv_buffer="shared"),
    )
    resumed = {"work_dir": tmp_path / "work", "resume": True, "verify": False}
    assert (
        "calibrate" not in export(grown, RunOptions(tmp_path / "grown", **resumed)).report.seconds
    )
    assert told(tmp_path / "grown") == ("grown", "grown")
    again = {"from_artifact": tmp_path / "artifact", "verify": False}
    export(grown, RunOptions(tmp_path / "again", **again))
    assert told(tmp_path / "again") == ("grown", "grown")
    export(shared, RunOptions(tmp_path / "shared", **again))
    assert told(tmp_path / "shared") == ("shared", "shared")
    with pytest.raises(
        BackendError, match="'half' of backend 'torch' cannot be written with --kv-buffer shared"
    ):
        export(
            few(model, "plain", "half", kv_buffer="shared"), RunOptions(tmp_path / "both", **again)
        )


def test_what_a_target_refuses_or_warns_of_is_said_before_the_long_job(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def quantized(*_: Any) -> None:
        raise RotqError("calibrated first")

    monkeypatch.setattr(Calibrating, "quantized", quantized)
    with pytest.raises(
        BackendError, match="target 'half' of backend 'torch' cannot express R4: it has no place"
    ):
        export(few(model, "half", rotate="r1,r4"), RunOptions(tmp_path / "out"))
    with pytest.raises(
        BackendError, match="cannot be written with --kv-buffer shared: its caches only grow"
    ):
        export(few(model, "half", kv_buffer="shared"), RunOptions(tmp_path / "out"))
    # what is only calibrated is no concern of a target
    with pytest.raises(RotqError, match="calibrated first"):
        calibrate(few(model, "half", rotate="r4"), RunOptions(tmp_path / "out"))
    recipe = few(model, "plain", "own", overrides={"model.embed_tokens": "int8-weight-only"})
    with pytest.raises(
        BackendError, match="cannot express this model: its embedding is quantized"
    ) as caught:
        export(recipe, RunOptions(tmp_path / "out"))
    assert caught.value.hint == "leave --override for it out"
    with (
        caplog.at_level(logging.WARNING, "exporter"),
        pytest.raises(RotqError, match="calibrated first"),
    ):
        export(few(model, "plain", scheme="w4a8"), RunOptions(tmp_path / "out"))
    assert any(
        "target 'plain': 14 linears with int4 weights" in record.message
        for record in caplog.records
    )


TRAINED_BRIEFLY = {
    "gate.nsamples": 2,
    "rotation.r1_tokens": 128,
    "rotation.r2_tokens": 64,
    "rotation.r1.epochs": 1,
    "rotation.r2.epochs": 1,
}


def test_auto_compares_only_what_every_target_can_express(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def compared(*targets: str) -> list[str]:
        recipe = few(model, *targets, dtype="float32", rotate="auto", **TRAINED_BRIEFLY)
        report = export(recipe, RunOptions(tmp_path / targets[-1], verify=False)).report
        return [row.rotate for row in report.gate if not row.norms_kept]

    assert compared("plain") == ["none", "r1,r2", "r1,r2,r4", "r1,r2,r4, Hadamard"]
    assert not any("leaves" in message for message in caplog.messages)
    assert compared("plain", "half") == ["none", "r1,r2", "r1,r2, Hadamard"]
    assert (
        "--rotate auto leaves R4 out: target 'half' cannot express it: it has no place for one"
        in caplog.messages
    )


def test_rotations_of_an_artifact_or_a_file_are_refused_too(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(few(model, "half", rotate="r4", scheme="int8"), RunOptions(tmp_path / "artifact"))
    again = RunOptions(tmp_path / "out", from_artifact=tmp_path / "artifact")
    recipe = few(model, "plain", "half")  # its own rotate, 'none', is not what counts
    with pytest.raises(BackendError, match="'half' of backend 'torch' cannot express R4") as caught:
        export(recipe, again)
    assert "calibrate without r4 in --rotate" in str(caught.value.hint)
    with pytest.raises(BackendError, match="'half' of backend 'torch' cannot express R4"):
        plan(recipe, again)
    assert "r1" not in export(few(model, "plain"), again).report.rotate
    monkeypatch.setattr(Calibrating, "quantized", lambda *_: pytest.fail("calibrated first"))
    given = few(model, "half", rotate="auto", rotation__files=[str(tmp_path / "artifact")])
    with pytest.raises(BackendError, match="'half' of backend 'torch' cannot express R4"):
        export(given, RunOptions(tmp_path / "other"))


def test_a_plan_of_an_artifact_knows_its_cache(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(few(model, "plain", kv="int8"), RunOptions(tmp_path / "artifact"))
    limits = Limits(cache=lambda _: "it keeps none")
    monkeypatch.setattr(TorchBackend, "refusals", lambda _, request: limits.reasons(request))
    with pytest.raises(BackendError, match="cannot express a KV cache of int8: it keeps none"):
        plan(few(model, "plain"), RunOptions(tmp_path / "out", from_artifact=tmp_path / "artifact"))
