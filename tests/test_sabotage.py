"""Faults that are put in on purpose fail the parity check; all of them: ``make sabotage``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from calib.artifact.files import MANIFEST
from calib.errors import CheckpointError
from exporter.commands.export import export
from exporter.recipe import RECIPE_FILE, load_recipe
from exporter.run.options import RunOptions
from tests.sabotage.run import SABOTAGES, Workshop
from tests.sealing import edit_sealed

FEW = {
    "amax doubled": "static ranges",
    "amax 8.0": "static ranges",
    "softmax scale": "activations not rounded",
    "fold: rare rows": "embedding rows",
    "down float": "stored against planned",
    "genai head_size": "metadata",
    "tokenizer missing": "metadata",
    "tripy axis": "metadata",
    "tripy signs": "metadata",
    "quant_algo": "metadata",
}
"""Sabotages that no check found once, and what finds them."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("sabotage"))


@pytest.mark.parametrize("name", FEW)
def test_a_fault_is_found_at_export_and_by_verify(workshop: Workshop, name: str) -> None:
    (sabotage,) = (each for each in SABOTAGES if each.name == name)
    outcome = workshop.run(sabotage)
    assert outcome.exported is not None
    assert outcome.exported.status == "failed"
    assert FEW[name] in outcome.exported.by
    assert outcome.verified is not None
    assert outcome.verified.caught
    assert not outcome.lifted


def test_every_fault_has_a_name_of_its_own() -> None:
    assert len({each.name for each in SABOTAGES}) == len(SABOTAGES) >= 60
    assert all((each.patch is None) != (each.damage is None) for each in SABOTAGES)


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
