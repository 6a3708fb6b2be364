"""Activations that float16 cannot hold: the figures fail, and say which module and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import exporter
from calib.errors import RotationError
from exporter.commands.rotate import rotate
from exporter.recipe import load_recipe
from exporter.reporting.report import Report
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint

SMALL = {
    "calibration.nsamples": 4,
    "calibration.seqlen": 32,
    "gate.nsamples": 2,
    "evaluation.nsamples": 2,
    "rotate": "none",
    "prefix": "none",
    "dtype": "float16",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its weights fit float16, and the product of gate and up does not."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "large")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"].mul_(2000)
    tensors["model.layers.0.mlp.down_proj.weight"].mul_(1e-6)
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def test_an_export_is_written_and_failed_with_the_module_and_the_cure(
    model: str, tmp_path: Path
) -> None:
    changes = {"scheme": "int8-weight-only", "backend": "safetensors", "target": "tensorrt"}
    result = exporter.export(
        model, load_recipe(None, {**SMALL, **changes}), output=tmp_path / "out"
    )
    assert Report.load(result.output) == result.report
    assert result.report.status == "failed"
    last = result.report.parity[-1]
    assert last.name == "largest activation in float16"
    assert last.measured is not None
    assert last.measured > 1
    assert last.passed is False
    assert "model.layers.0.mlp.down_proj" in last.note
    assert "--dtype bfloat16" in last.note


def test_a_rotated_folder_is_refused_with_the_same(model: str, tmp_path: Path) -> None:
    with pytest.raises(
        RotationError, match=r"layers\.0\.mlp\.down_proj reaches .* 65504"
    ) as caught:
        rotate(load_recipe(None, {**SMALL, "model": model}), RunOptions(tmp_path / "out"))
    assert "--dtype bfloat16" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
