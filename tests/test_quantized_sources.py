"""Checkpoints that exist only quantized go the whole way of float ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib.errors import CheckpointError
from exporter.commands.export import export
from exporter.planning.plan import plan
from exporter.recipe import load_recipe
from exporter.run.options import RunOptions
from exporter.source import open_source
from tests.checkpoints import write_checkpoint
from tests.few import few, parity_row
from tests.tiny import relative_l2

_BLOCK = 16
_INT4 = {"num_bits": 4, "strategy": "group", "group_size": 16}


def _fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The stored tensors of a weight, and what they stand for."""
    blocks = weight.unfold(0, _BLOCK, _BLOCK).unfold(1, _BLOCK, _BLOCK)
    scale = blocks.abs().amax((-1, -2)) / 448
    wide = scale.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
    stored = (weight / wide).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * wide


def _int4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**_INT4))
    scale = weight.unflatten(1, (-1, 16)).abs().amax(-1) / 7
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


KINDS: dict[str, tuple[Callable[[Tensor], tuple[dict[str, Tensor], Tensor]], dict[str, Any]]] = {
    "fp8": (_fp8, {"quant_method": "fp8", "weight_block_size": [_BLOCK, _BLOCK]}),
    "compressed-tensors": (
        _int4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": _INT4}},
        },
    ),
}


@pytest.fixture(params=KINDS)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A quantized checkpoint, and the float one that it stands for."""
    quantize, settings = KINDS[request.param]
    quantized, floats = (write_checkpoint(tmp_path / name) for name in ("quantized", "floats"))
    tensors = load_file(floats / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        parts, tensors[name] = quantize(tensor)
        stored |= {name.replace("weight", key, 1): part for key, part in parts.items()}
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, floats / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = settings
    (quantized / "config.json").write_text(json.dumps(config))
    (quantized / "quantize_config.json").write_text("{}")
    return quantized, floats


def test_source_and_plan_are_those_of_the_float_checkpoint(folders: tuple[Path, Path]) -> None:
    recipes = [load_recipe(None, {"model": str(folder)}) for folder in folders]
    ours, theirs = map(open_source, recipes)
    assert set(ours.checkpoint) == set(theirs.checkpoint)
    for name, tensor in theirs.checkpoint.items():
        assert torch.equal(ours.checkpoint[name], tensor)
    assert ours.quantized is not None
    assert theirs.quantized is None

    planned, expected = (plan(recipe, RunOptions(Path("out"))) for recipe in recipes)
    assert planned.source_quantized == ours.quantized
    assert planned.parameters == expected.parameters == ours.parameters()
    assert planned.quantized_parameters == expected.quantized_parameters
    assert planned.bytes_before == ours.nbytes() < expected.bytes_before

    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        found, wanted = (source.original("cpu")(input_ids=ids).logits for source in (ours, theirs))
    assert relative_l2(found, wanted) <= 1e-6


@pytest.mark.parametrize("folders", ["compressed-tensors"], indirect=True)
def test_an_export_says_that_its_source_was_quantized(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = export(few(model=str(folders[0]), rotate="r1,r2"), RunOptions(out)).report
    assert report.status == "passed"
    assert report.model.quantized == open_source(few(model=str(folders[0]))).quantized
    assert report.model.quantized in (out / "README.md").read_text()
    for rung, metric in ((1, "relative L2"), (3, "perplexity ratio")):
        note = parity_row(report, rung, "original float", metric).note
        assert f"quantized ({report.model.quantized})" in note
        assert "decoder reads it, unchecked" in note
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_a_missing_scale_is_refused_by_plan_and_run(folders: tuple[Path, Path]) -> None:
    path = folders[0] / "model.safetensors"
    tensors = load_file(path)
    scale = next(name for name in tensors if "weight_scale" in name)
    del tensors[scale]
    save_file(tensors, path, metadata={"format": "pt"})
    recipe = load_recipe(None, {"model": str(folders[0])})
    with pytest.raises(CheckpointError, match="missing") as planned:
        plan(recipe, RunOptions(Path("out")))
    with pytest.raises(CheckpointError, match="missing") as run:
        open_source(recipe)
    assert planned.value.message == run.value.message
