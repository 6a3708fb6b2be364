"""The whole tool on real input: export, run in ONNX Runtime, verify, evaluate, resume and export
again.
"""

from __future__ import annotations

import json
from pathlib import Path

from calib.artifact import load_artifact
from exporter.commands.evaluate import evaluate
from exporter.output import LIST_FILE, sha256_tree
from exporter.recipe import RECIPE_FILE
from exporter.reporting.report import REPORT_FILE, Report
from tests.few import measured


def test_the_embedded_model_passes_every_rung(exported: Path) -> None:
    report = Report.load(exported)
    assert report.status == "passed"
    assert measured(report, 1, "original float") <= 1e-5
    assert measured(report, 2, "each linear") <= 1e-5
    floor = measured(report, 2, "split-sum floor")
    assert 0 < floor < 0.1  # rounding flips amplify, but two orders of summation stay one model
    for mode in ("exact session", "default session", "decode with cache", "left-padded"):
        assert measured(report, 2, mode) <= 2 * floor
    assert measured(report, 3, "original float", "perplexity ratio") <= 1.02
    assert measured(report, 2, "linears left", "unfused") == 0


def test_the_gate_finds_the_online_rotation_and_prints_what_it_turned_down(exported: Path) -> None:
    report = Report.load(exported)
    assert [row.rotate for row in report.gate] == [
        "none",
        "r1,r2",
        "r1,r2,r4",
        "r1,r2,r4, Hadamard",
    ]
    chosen = next(row for row in report.gate if row.chosen)
    assert chosen.margin_low is not None
    assert chosen.margin_low <= 0  # it has the lowest KL, or is within noise of it
    assert all(row.margin_low is not None for row in report.gate)
    assert all(len(row.row_kls) == len(row.row_tokens) == 8 for row in report.gate)
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


def test_perplexity_of_the_export_is_close_to_the_checkpoint(exported: Path) -> None:
    found = evaluate(str(exported), None, nsamples=8)
    original = evaluate("embedded", None, nsamples=8)
    assert found.tokens == original.tokens > 1000
    assert found.perplexity / original.perplexity <= 1.02
    assert found.runtime.startswith("ONNX Runtime ")
    assert original.runtime == "torch"


def test_a_saved_model_is_what_was_calibrated(exported: Path) -> None:
    quantized = load_artifact(exported.parent / "work" / "artifact")
    assert len(quantized.linears) == 42
    assert quantized.kept.keys() == {"lm_head"}
    for linear in quantized.linears.values():
        assert linear.input_scale is not None
        assert float(linear.input_scale) > 0
        assert bool((linear.weight_scale > 0).all())
