"""``rotq inspect``: what it finds in a folder, for every backend, and in one that was edited."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cli_support import rotq

from calib.artifact import load_artifact
from calib.errors import BackendError, CheckpointError
from exporter.cli import main
from exporter.commands.evaluate import evaluate
from exporter.commands.export import calibrate, export
from exporter.commands.inspect import inspect_folder
from exporter.commands.verify import verify
from exporter.recipe import load_recipe
from exporter.reporting.report import Report
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint
from tests.torch_backend import WEIGHTS, install

SETTINGS: dict[str, Any] = {
    "backend": "torch",
    "rotate": "r4",
    "scheme": "int8",
    "kv": "int8",
    "overrides": {"*.0.mlp.up_proj": "int4-weight-only", "*.1.mlp.up_proj": "float"},
    "calibration.nsamples": 4,
    "calibration.seqlen": 48,
}


@pytest.fixture(autouse=True)
def torch_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    install(tmp_path / "site", monkeypatch)


def exported(tmp_path: Path, **changes: Any) -> Path:
    model = write_checkpoint(tmp_path / "model")
    recipe = load_recipe(None, {**SETTINGS, "model": str(model), **changes})
    return export(recipe, RunOptions(tmp_path / "out", verify=False)).output


def test_an_export_is_described_from_its_files(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    found = inspect_folder(folder)
    linears = load_artifact(folder / WEIGHTS).linears
    assert [linear.name for linear in found.linears] == list(linears)
    assert found.schemes == {
        "int8 weights per channel, int8 inputs per tensor": 12,
        "int4 weights in blocks of 128, float inputs": 1,
    }
    assert found.unfused == ["model.layers.0.mlp.up_proj"]
    assert found.kernels == {"MatMul": 12, "Dequantize": 1}
    online = {
        linear.name: linear.online_rotation for linear in found.linears if linear.online_rotation
    }
    assert set(online) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert found.cache == "int8"
    assert (found.backend, found.target, found.dtype, found.status) == (
        "torch",
        "plain",
        "float32",
        "unverified",
    )
    assert "model.layers.1.mlp.up_proj" in found.kept
    assert found.edited == {}
    assert found.nbytes == Report.load(folder).layers.bytes_after
    stored = {(part.kind, part.dtype): part for part in found.contents}
    assert stored["quantized weight", "int8"].nbytes == sum(
        linear.weight.numel() for linear in linears.values()
    )
    assert found.bytes_before == Report.load(folder).layers.bytes_before


def test_an_artifact_is_described_too(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    calibrate(
        load_recipe(None, {**SETTINGS, "model": str(model)}), RunOptions(tmp_path / "artifact")
    )
    found = inspect_folder(tmp_path / "artifact")
    assert (found.what, found.backend, found.cache) == ("calibrated", None, "int8")
    assert found.fusion_note == "no runtime has shaped it yet"
    assert len(found.linears) == 13
    assert {linear.fused for linear in found.linears} == {None}
    kinds = Counter(
        {part.kind: part.tensors for part in found.contents if part.kind != "float weight"}
    )
    assert kinds == {"quantized weight": 13, "scale": 13 + 12}


def test_a_target_that_does_not_tell_how_it_runs_says_so(tmp_path: Path) -> None:
    found = inspect_folder(exported(tmp_path, target="own"))
    assert found.fusion_note == "the runtime does not tell how it executes them"
    assert found.unfused == []


def test_edited_files_are_a_finding_and_damaged_ones_end_it(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    (folder / "tokenizer.json").unlink()
    manifest = folder / WEIGHTS / "quantized_model.json"
    manifest.write_text(manifest.read_text() + " ")
    assert inspect_folder(folder).edited == {
        "missing": ["tokenizer.json"],
        "changed": [f"{WEIGHTS}/{manifest.name}"],
    }
    manifest.write_text("{")
    found = inspect_folder(folder)
    assert "is damaged" in found.unreadable
    assert found.linears == ()
    report = Report.load(folder)
    from exporter.output import sha256_tree

    report.model_copy(update={"checksums": sha256_tree(folder, exclude=("report.json",))}).save(
        folder
    )
    with pytest.raises((BackendError, CheckpointError), match="is damaged"):
        inspect_folder(folder)


def test_every_reader_refuses_what_was_edited_or_lists_nothing(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    report = Report.load(folder)
    (folder / "vocab.json").write_text("{}")
    assert inspect_folder(folder).edited == {"added": ["vocab.json"]}
    for reader in (verify, lambda folder: evaluate(str(folder), None, nsamples=1)):
        with pytest.raises(CheckpointError, match=r"not what was exported \(added: vocab.json\)"):
            reader(folder)
    report.model_copy(update={"checksums": {}}).save(folder)
    for reader in (inspect_folder, verify, lambda folder: evaluate(str(folder), None, nsamples=1)):
        with pytest.raises(CheckpointError, match="holds no checksums"):
            reader(folder)


@pytest.mark.usefixtures("clean_logging")
def test_the_command_prints_tables_json_or_one_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path)
    found = inspect_folder(folder)
    capsys.readouterr()
    assert main(["inspect", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schemes"] == found.schemes
    assert document["linears"][0]["name"] == found.linears[0].name
    assert document["nbytes"] == found.nbytes
    assert main(["inspect", str(folder), "-q"]) == 0
    assert capsys.readouterr().out == f"{found.nbytes}\n"
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    for expected in (
        "int4 weights in blocks of 128, float inputs",
        "12 of 13 quantized linears run in integer kernels",
        "dequantized on every run: model.layers.0.mlp.up_proj",
        "KV cache: int8",
        "checksums: all files are as exported; parity: unverified",
    ):
        assert expected in out
    assert "self_attn.q_proj" not in out
    (folder / "tokenizer.json").unlink()
    assert main(["inspect", str(folder), "-v"]) == 0
    out, err = capsys.readouterr()
    assert "model.layers.1.self_attn.q_proj" in out
    assert "warning: missing since the export: tokenizer.json" in err


def test_what_rotq_did_not_write_is_refused_and_targets_inside_are_named(tmp_path: Path) -> None:
    done = rotq("inspect", tmp_path)
    assert done.returncode == 1
    assert "holds nothing that rotq wrote" in done.stderr
    (tmp_path / "ort").mkdir()
    (tmp_path / "ort" / "report.json").write_text("{}")
    assert f"give one of {tmp_path / 'ort'}" in " ".join(rotq("inspect", tmp_path).stderr.split())
    assert "is not a complete export" in rotq("inspect", tmp_path / "ort").stderr
