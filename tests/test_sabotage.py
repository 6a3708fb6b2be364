"""Faults that are put in on purpose fail the parity check."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from calib.artifact.files import MANIFEST
from calib.errors import CheckpointError
from exporter.commands.export import export
from exporter.recipe import RECIPE_FILE, load_recipe
from exporter.run.options import RunOptions
from tests.sealing import edit_sealed


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
