"""Layer-wise runs of the pipeline: equal to whole-model runs, resumable, and refused where they
must be.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.artifact import QuantizedModel, load_artifact
from calib.errors import OutputError, RecipeError
from exporter.commands.evaluate import evaluate
from exporter.commands.export import calibrate
from exporter.recipe import load_recipe, parse_size
from exporter.run import quantizing
from exporter.run.options import RunOptions
from exporter.run.quantizing import check_layerwise
from exporter.run.workdir import ARTIFACT, WALK

FEW = {"calibration.nsamples": 4, "calibration.seqlen": 32, "rotate": "r1,r2,r4", "scheme": "int8"}


def quantized(tmp_path: Path, name: str, **settings: Any) -> QuantizedModel:
    options = RunOptions(
        tmp_path / name, work_dir=settings.pop("work", None), resume=settings.pop("resume", False)
    )
    recipe = load_recipe(
        None, {**FEW, **{key.replace("__", "."): value for key, value in settings.items()}}
    )
    calibrate(recipe, options)
    return load_artifact(options.output)


def test_a_layerwise_run_is_the_whole_model_run(tmp_path: Path) -> None:
    tables = {"lm_head": "int8", "model.embed_tokens": "int8-weight-only"}
    layerwise = quantized(tmp_path, "one", layerwise__enabled=True, overrides=tables)
    assert layerwise.linears.keys() > tables.keys()
    assert not list(tmp_path.glob(".one*"))  # the temporary folder is gone
    whole = quantized(tmp_path, "other", overrides=tables)
    assert layerwise.provenance.rotation_gate == whole.provenance.rotation_gate != ()
    assert layerwise.rotations.kinds() == ("r1", "r2", "r4")
    for rotation in whole.rotations.values():  # trained, each on its own capture
        assert torch.equal(layerwise.rotations[rotation.name].dense(), rotation.dense())
    assert list(layerwise.linears) == list(whole.linears)
    for name, linear in layerwise.linears.items():
        for key, tensor in linear.tensors().items():
            assert torch.equal(tensor, whole.linears[name].tensors()[key]), key
    assert layerwise.kept == whole.kept
    result = evaluate(str(tmp_path / "one"), None, nsamples=2, window=64)
    assert result.runtime == "torch, fake-quantized"
    assert (
        result.perplexity
        == evaluate(str(tmp_path / "other"), None, nsamples=2, window=64).perplexity
    )


@pytest.mark.parametrize("scheme", ["int8", "float"])
def test_both_ways_make_the_same_online_rotations(tmp_path: Path, scheme: str) -> None:
    layerwise, whole = (
        quantized(tmp_path, name, scheme=scheme, rotate="r1,r3,r4", layerwise__enabled=enabled)
        for name, enabled in (("one", True), ("other", False))
    )
    online = [rotation for rotation in whole.rotations.values() if rotation.online]
    assert len(online) == 2 * whole.config["num_hidden_layers"]
    for rotation in online:
        assert vars(layerwise.rotations[rotation.name]) == vars(rotation)


def test_a_work_folder_keeps_the_walk_until_it_is_whole(tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = quantized(tmp_path, "first", layerwise__enabled=True, work=work)
    assert (work / ARTIFACT).is_dir()
    assert not (work / WALK).exists()
    again = quantized(tmp_path, "again", layerwise__enabled=True, work=work, resume=True)
    assert again.provenance == first.provenance
    with pytest.raises(OutputError, match="scheme was int8 and is now w4a8"):
        quantized(tmp_path, "third", layerwise__enabled=True, work=work, resume=True, scheme="w4a8")


def test_a_walk_is_not_resumed_for_a_target_that_quantizes_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of both in one artifact would be of no run."""
    few = {"layerwise.enabled": True, "rotate": "none", "scheme": "int8-weight-only"}
    recipe = load_recipe(None, {**FEW, **few})

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    def resumed() -> None:
        options = RunOptions(tmp_path / "out", work_dir=tmp_path / "work", resume=True)
        calibrate(recipe, options)

    with monkeypatch.context() as patch:
        patch.setattr("calib.layerwise.calibrator._assembled", stop)
        with pytest.raises(KeyboardInterrupt):
            resumed()
    own = quantizing.quantization_of
    monkeypatch.setattr(
        "exporter.run.inputs.quantization_of", lambda *given: replace(own(*given), weights="mse")
    )
    with pytest.raises(OutputError, match=r"quantization was .* and is now"):
        resumed()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layerwise.enabled": True, "rotate": "auto"}, "cannot compare sets of rotations"),
        (
            {"layerwise.enabled": True, "rotate": "none", "prefix": 2, "smoothing": "awq"},
            "cannot smooth behind a prefix",
        ),
        ({"layerwise.asym": True}, "'layerwise.asym' has no effect"),
        ({"layerwise.max_memory": "much"}, r"'layerwise.max_memory': this is no size.*'much'"),
        ({"layerwise.max_memory": "0GB"}, "is no size"),
        ({"max_shard_size": "GB"}, r"'max_shard_size': this is no size"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        check_layerwise(load_recipe(None, settings))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("1KB", 1000),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("2g", 2 * 10**9),
        (" 3 MiB ", 3 * 2**20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
