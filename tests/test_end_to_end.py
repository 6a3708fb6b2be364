"""The whole tool on real input: export, run in ONNX Runtime, verify, evaluate, resume and export
again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from calib.artifact import load_artifact
from calib.artifact.files import MANIFEST
from calib.errors import CheckpointError, OutputError
from exporter import export as export_from_python
from exporter.commands.evaluate import evaluate
from exporter.commands.export import calibrate, export, run_capture
from exporter.commands.verify import verify
from exporter.output import LIST_FILE, sha256_tree
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe
from exporter.reporting.report import REPORT_FILE, ParityRow, Report
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint
from tests.conftest import SMALL
from tests.sealing import edit_sealed

FEW = {
    "calibration.nsamples": 8,
    "calibration.seqlen": 64,
    "gate.nsamples": 2,
    "evaluation.nsamples": 4,
    "rotation.r1_tokens": 512,
    "rotation.r2_tokens": 128,
    "rotation.r1.epochs": 2,
    "rotation.r2.epochs": 2,
}


def _few(**changes: object) -> Recipe:
    return load_recipe(
        None, {**FEW, **{key.replace("__", "."): value for key, value in changes.items()}}
    )


def _row(report: Report, rung: int, name: str, metric: str = "relative L2") -> ParityRow:
    found = [
        row
        for row in report.parity
        if row.rung == rung and name in row.name and row.metric == metric
    ]
    assert len(found) == 1, [row.name for row in report.parity]
    return found[0]


def _measured(report: Report, rung: int, name: str, metric: str = "relative L2") -> float:
    value = _row(report, rung, name, metric).measured
    assert value is not None
    return value


def test_the_embedded_model_passes_every_rung(exported: Path) -> None:
    report = Report.load(exported)
    assert report.status == "passed"
    assert _measured(report, 1, "original float") <= 1e-5
    assert _measured(report, 2, "each linear") <= 1e-5
    floor = _measured(report, 2, "split-sum floor")
    assert 0 < floor < 0.1  # rounding flips amplify, but two orders of summation stay one model
    for mode in ("exact session", "default session", "decode with cache", "left-padded"):
        assert _measured(report, 2, mode) <= 2 * floor
    assert _measured(report, 3, "original float", "perplexity ratio") <= 1.02
    assert _measured(report, 2, "linears left", "unfused") == 0


def test_the_gate_finds_the_online_rotation_and_prints_what_it_turned_down(exported: Path) -> None:
    report = Report.load(exported)
    assert [row.rotate for row in report.gate] == [
        "none",
        "r1,r2",
        "r1,r2,r4",
        "r1,r2,r4, Hadamard",
    ]
    chosen = next(row for row in report.gate if row.chosen)
    assert chosen.kl == min(row.kl for row in report.gate)
    assert report.rotate == "r1,r2,r4"  # this model's down_proj inputs have heavy outliers
    assert chosen.rotate.startswith("r1,r2,r4")
    assert {rotation.online for rotation in report.rotations if rotation.name.startswith("R4")} == {
        True
    }
    assert {
        rotation.online for rotation in report.rotations if rotation.name[:2] in ("R1", "R2")
    } == {False}


def test_the_folder_is_complete_and_its_checksums_hold(exported: Path) -> None:
    report = Report.load(exported)
    wanted = {
        "model.onnx",
        "model.onnx.data",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        RECIPE_FILE,
    }
    assert wanted | {"README.md", "rotations.safetensors"} <= report.checksums.keys()
    assert report.checksums == sha256_tree(exported, exclude=(REPORT_FILE, LIST_FILE))
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is False
    assert (
        0 < report.layers.bytes_after < report.layers.bytes_before
    )  # int8 linears, though head and embedding are fp32


def test_no_file_of_the_output_names_this_machine(exported: Path) -> None:
    here = str(Path(__file__).parents[1]).encode()
    for path in exported.iterdir():
        assert here not in path.read_bytes(), path.name


def test_verify_repeats_the_verdict_from_the_folder_alone(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    before = Report.load(folder)
    after = verify(folder)
    assert after.status == "passed"
    assert "verify" in Report.load(folder).seconds
    # The same linears on the same rows: the reference was rebuilt from the graph's own integers and
    # scales.
    assert _measured(after, 2, "each linear") == pytest.approx(
        _measured(before, 2, "each linear"), rel=1e-6
    )


def test_verify_names_the_file_that_was_edited(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    data = folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"changed: model\.onnx\.data"):
        verify(folder)


def test_verify_refuses_another_model(exported: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other")
    with pytest.raises(CheckpointError, match="fingerprint"):
        verify(shutil.copytree(exported, tmp_path / "copy"), model=str(other))


def test_a_wrong_scale_fails_the_parity_check(exported: Path, tmp_path: Path) -> None:
    """What a scale wrong by two does: cosine similarity of the linear stays 1, relative L2 does
    not.
    """
    artifact = exported.parent / "work" / "artifact"
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    from safetensors.torch import load_file, save_file

    recipe = load_recipe(artifact.parent / RECIPE_FILE)
    options = RunOptions(tmp_path / "out", from_artifact=folder)
    path = next(folder.glob("quantized_model*.safetensors"))
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="its checksum does not fit"):
        export(recipe, options)
    edit_sealed(folder / MANIFEST, lambda manifest: None)  # by whoever changed it
    result = export(recipe, options)
    assert result.report.status == "failed"
    assert (tmp_path / "out" / "model.onnx").is_file()  # kept, marked failed


def test_perplexity_of_the_export_is_close_to_the_checkpoint(exported: Path) -> None:
    found = evaluate(str(exported), None, nsamples=8)
    original = evaluate("embedded", None, nsamples=8)
    assert found.tokens == original.tokens > 1000
    assert found.perplexity / original.perplexity <= 1.02
    assert found.runtime.startswith("ONNX Runtime ")
    assert original.runtime == "torch"


def test_an_artifact_is_exported_again_without_calibration(exported: Path, tmp_path: Path) -> None:
    artifact = exported.parent / "work" / "artifact"
    recipe = load_recipe(exported.parent / "work" / RECIPE_FILE)
    result = export(recipe, RunOptions(tmp_path / "again", from_artifact=artifact, verify=False))
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    assert "calibrate" not in result.report.seconds
    assert result.report.status == "unverified"
    # with R4, trained or not
    assert [row.chosen for row in result.report.gate].index(True) in (2, 3)


def test_an_artifact_whose_original_is_gone_still_exports_and_says_what_it_cannot_check(
    tmp_path: Path,
) -> None:
    model = write_checkpoint(tmp_path / "model")
    calibrate(_few(model=str(model), rotate="r1,r2"), RunOptions(tmp_path / "artifact"))
    shutil.rmtree(model)
    recipe = load_recipe(tmp_path / "artifact" / RECIPE_FILE)
    report = export(
        recipe, RunOptions(tmp_path / "out", from_artifact=tmp_path / "artifact")
    ).report
    assert report.status == "passed"
    skipped = [row for row in report.parity if row.measured is None]
    assert {row.rung for row in skipped} == {1, 3}
    assert all("not at hand" in row.note for row in skipped)


def test_a_run_resumes_from_its_work_folder(exported: Path, tmp_path: Path) -> None:
    work = shutil.copytree(exported.parent / "work", tmp_path / "work")
    recipe = load_recipe(None, SMALL)
    result = export(recipe, RunOptions(tmp_path / "out", work_dir=work, resume=True, verify=False))
    assert "capture" not in result.report.seconds
    assert (tmp_path / "out" / "model.onnx.data").read_bytes() == (
        exported / "model.onnx.data"
    ).read_bytes()


def test_a_run_that_ended_after_its_capture_resumes_there(exported: Path, tmp_path: Path) -> None:
    work = shutil.copytree(exported.parent / "work", tmp_path / "work")
    shutil.rmtree(work / "artifact")
    recipe = load_recipe(None, SMALL)
    result = export(recipe, RunOptions(tmp_path / "out", work_dir=work, resume=True, verify=False))
    assert "capture" not in result.report.seconds
    assert "calibrate" in result.report.seconds
    assert (tmp_path / "out" / "model.onnx.data").read_bytes() == (
        exported / "model.onnx.data"
    ).read_bytes()


def test_a_resume_with_another_setting_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    work = shutil.copytree(exported.parent / "work", tmp_path / "work")
    changed = load_recipe(None, {**SMALL, "calibration.seqlen": 64})
    with pytest.raises(OutputError, match=r"calibration\.seqlen was 512 and is now 64"):
        export(changed, RunOptions(tmp_path / "out", work_dir=work, resume=True))
    with pytest.raises(OutputError, match="holds a run already"):
        export(changed, RunOptions(tmp_path / "out", work_dir=work))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path / "model"))

    def data(name: str, seed: int) -> bytes:
        recipe = _few(model=model, rotate="r1,r2,r4", seed=seed)
        export(recipe, RunOptions(tmp_path / name, verify=False))
        return (tmp_path / name / "model.onnx.data").read_bytes()

    first = data("first", 0)
    assert data("second", 0) == first
    assert data("third", 1) != first


def test_a_capture_is_reused(tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path / "model"))
    recipe = _few(model=model, rotate="r1,r2")
    run_capture(recipe, RunOptions(tmp_path / "capture"))
    direct = export(recipe, RunOptions(tmp_path / "direct", verify=False))
    reused = export(
        recipe, RunOptions(tmp_path / "reused", from_capture=tmp_path / "capture", verify=False)
    )
    assert "capture" in direct.report.seconds
    assert "capture" not in reused.report.seconds
    assert (tmp_path / "direct/model.onnx.data").read_bytes() == (
        tmp_path / "reused/model.onnx.data"
    ).read_bytes()
    other = recipe.model_copy(update={"model": str(write_checkpoint(tmp_path / "other", seed=1))})
    with pytest.raises(CheckpointError, match="another model"):
        export(other, RunOptions(tmp_path / "out", from_capture=tmp_path / "capture"))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"head_dim": 12, "num_key_value_heads": 4},
        {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 36, "head_dim": 10},
    ],
    ids=["biases, tied", "head_dim is not hidden / heads", "one kv head, odd sizes"],
)
def test_llamas_of_every_kind_pass(tmp_path: Path, changes: dict[str, object]) -> None:
    model = write_checkpoint(tmp_path / "model", **changes)
    report = export(_few(model=str(model), rotate="r1,r2,r4"), RunOptions(tmp_path / "out")).report
    assert [row.name for row in report.parity if row.passed is False] == []


@pytest.mark.parametrize("scheme", ["int8-weight-only", "int8"])
def test_a_model_object_is_exported_from_python(tmp_path: Path, scheme: str) -> None:
    folder = write_checkpoint(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = export_from_python(model, _few(scheme=scheme, rotate="r1,r2"), output=tmp_path / "out")
    assert result.report.status == "passed"
    assert result.report.scheme == scheme
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_saved_model_is_what_was_calibrated(exported: Path) -> None:
    quantized = load_artifact(exported.parent / "work" / "artifact")
    assert len(quantized.linears) == 42
    assert quantized.kept.keys() == {"lm_head"}
    for linear in quantized.linears.values():
        assert linear.input_scale is not None
        assert float(linear.input_scale) > 0
        assert bool((linear.weight_scale > 0).all())
