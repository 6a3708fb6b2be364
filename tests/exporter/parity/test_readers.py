"""Figures of an export for a reader are what that reader computes: measured again with nothing of
rotq between it and the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backends.asking import expressible
from backends.safetensors.backend import SafetensorsBackend
from calib.measure.perplexity import model_logits, perplexity
from calib.schemes import SCHEMES
from exporter.commands.export import export
from exporter.commands.verify import verify
from exporter.recipe import Recipe, load_recipe
from exporter.reporting.report import ParityRow, Report
from exporter.run.options import RunOptions
from exporter.source import open_source, read_rows
from tests.checkpoints import write_checkpoint

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

FEW: dict[str, Any] = {
    "backend": "safetensors",
    "rotate": "none",
    "calibration.nsamples": 4,
    "calibration.seqlen": 48,
    "gate.nsamples": 1,
    "evaluation.nsamples": 2,
}
SAME = 1e-6
"""Relative: the same float32 operations, whose logarithms are summed in float64."""
IN_TRANSFORMERS = [
    name
    for name, scheme in SCHEMES.items()
    if scheme.linear is None
    or expressible(SafetensorsBackend(), "transformers", [scheme.linear], None)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Widths are multiples of 32, as formats with blocks of their own have it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return str(write_checkpoint(folder, hidden_size=64, intermediate_size=96))


def few(model: str, **changes: Any) -> Recipe:
    return load_recipe(
        None, {**FEW, "model": model, **{key.replace("__", "."): v for key, v in changes.items()}}
    )


def figure(report: Report, metric: str) -> ParityRow:
    (row,) = [row for row in report.parity if row.rung == 3 and row.metric == metric]
    return row


@pytest.mark.parametrize("scheme", IN_TRANSFORMERS)
def test_quality_is_that_of_plain_transformers(scheme: str, model: str, tmp_path: Path) -> None:
    import transformers

    recipe = few(model, scheme=scheme, target="transformers")
    report = export(recipe, RunOptions(tmp_path / "out")).report
    assert [row.name for row in report.parity if row.passed is False] == []
    assert report.status == "passed"
    assert report.not_run_in == ""
    ran = {row.runtime for row in report.parity if row.rung > 1 and row.session}
    assert all(runtime.startswith(f"transformers {transformers.__version__}") for runtime in ran)
    assert figure(report, "perplexity ratio").runtime in ran

    source = open_source(recipe)
    rows = read_rows(recipe, source.tokenizer, source.config).evaluation
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    scored = [
        perplexity(model_logits(each), rows, window=128, stride=128).value
        for each in (source.original("cpu"), plain)
    ]
    assert figure(report, "perplexity ratio").measured == pytest.approx(
        scored[1] / scored[0], rel=SAME
    )


def test_auto_leaves_out_what_transformers_would_pass_over(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = few(model, scheme="int8", target="transformers", rotate="auto")
    report = export(recipe, RunOptions(tmp_path / "out", verify=False)).report
    assert {row.rotate.split(",")[-1] for row in report.gate} <= {"none", "r2", " Hadamard"}
    assert "--rotate auto leaves R4 out: target 'transformers' cannot express it" in caplog.text
    assert not any(rotation.online for rotation in report.rotations)


@pytest.mark.parametrize("layerwise", [False, True])
def test_r4_for_vllm_is_in_its_blocks_and_nothing_says_that_vllm_ran(
    layerwise: bool, model: str, tmp_path: Path
) -> None:
    """96 channels: the largest power of two that divides is 32."""
    folder = tmp_path / "out"
    recipe = few(model, scheme="int8", target="vllm", rotate="r4", layerwise__enabled=layerwise)
    report = export(recipe, RunOptions(folder)).report
    assert report.status == "passed"
    assert {rotation.origin for rotation in report.rotations} == {"Hadamard in blocks of 32"}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = config["transform_config"]["config_groups"].values()
    assert (group["type"], group["head_dim"]) == ("hadamard", 32)
    assert any("tensor parallelism" in warning for warning in report.warnings)
    assert report.not_run_in == "vLLM"
    assert figure(report, "perplexity ratio").runtime == "torch, from the file"
    card = (folder / "README.md").read_text()
    assert "**Parity passed, but not in vLLM**: the exported files were run in torch" in card
    assert "not run in: vLLM" in card
    assert verify(folder).not_run_in == "vLLM"


def test_files_for_vllm_are_run_in_transformers_where_it_reads_the_same(
    model: str, tmp_path: Path
) -> None:
    report = export(few(model, scheme="int8", target="vllm"), RunOptions(tmp_path / "out")).report
    assert (report.status, report.not_run_in) == ("passed", "vLLM")
    assert figure(report, "perplexity ratio").runtime.startswith("transformers ")
