"""The gate smooths in front of R4 where nothing else is close enough, and the report says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from calib.artifact import load_artifact
from exporter.commands.export import calibrate, export
from exporter.commands.verify import verify
from exporter.recipe import Recipe, load_recipe
from exporter.reporting.describe import SMOOTHING_FILE
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint

FACTOR = 1e4


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama with one huge feature in front of the first down projection, whose weights take it
    back. R4 spreads it over all features, where it drowns them."""
    folder = write_checkpoint(tmp_path_factory.mktemp("outlier") / "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight *= 30  # the MLP says much, so that it matters how it is rounded
        mlp.up_proj.weight[0] *= FACTOR
        mlp.down_proj.weight[:, 0] /= FACTOR
    model.save_pretrained(folder)
    return str(folder)


def few(model: str, **changes: Any) -> Recipe:
    base = {
        "model": model,
        "rotate": "auto",
        "widen": "none",
        "prefix": "none",
        "calibration.nsamples": 4,
        "calibration.seqlen": 48,
        "gate.nsamples": 2,
        "evaluation.nsamples": 2,
    }
    return load_recipe(None, base | changes)


def test_an_outlier_that_r4_only_spreads_is_smoothed(outlier: str, tmp_path: Path) -> None:
    report = export(few(outlier), RunOptions(tmp_path / "out")).report
    chosen = next(row for row in report.gate if row.chosen)
    assert chosen.smoothing == report.calibration.smoothing == "smoothquant:0.5"
    assert chosen.name == f"{chosen.rotate} + smoothquant:0.5"
    assert "r4" in chosen.rotate
    assert chosen.kl is not None
    others = [row for row in report.gate if row is not chosen]
    assert all(row.smoothing == "none" for row in others)
    assert all(row.kl is not None and chosen.kl < row.kl / 2 for row in others)

    # the scales travel along, and the float model is fused with them again
    assert (tmp_path / "out" / SMOOTHING_FILE).is_file()
    again = verify(tmp_path / "out")
    assert again.status == report.status
    assert again.calibration.smoothing == "smoothquant:0.5"


@pytest.mark.parametrize(
    "changes",
    [{"smoothing": "smoothquant:auto"}, {"scheme": "float8"}, {"scheme": "int8-dynamic"}],
    ids=str,
)
def test_nothing_else_is_smoothed_however_far_off_it_is(
    changes: dict[str, str], outlier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the recipe asks for stays; floats and scales of each token have no fixed steps."""
    monkeypatch.setattr("exporter.run.gate.MARGIN", 0.0)  # nothing is close enough
    calibrate(few(outlier, **changes), RunOptions(tmp_path / "out"))
    rows = load_artifact(tmp_path / "out").provenance.gate
    assert any("r4" in row["rotate"] and row["kl"] is not None for row in rows)
    assert all(row["smoothing"] == "none" for row in rows)
