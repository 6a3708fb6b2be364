"""What a run refuses where the family of a model is not in the table."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.asking import reasons_against
from backends.base import Request
from backends.safetensors.backend import SafetensorsBackend
from calib.architectures import Architecture, wiring_for
from calib.artifact import save_artifact
from calib.errors import CheckpointError, RotqError
from calib.fusing import fuse
from calib.network.checkpoint import Checkpoint
from calib.network.skeleton import portable_config
from calib.process.progress import silent
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.rotations.rotation_set import RotationSet
from calib.schemes import scheme_named
from exporter.recipe import load_recipe
from exporter.run.artifacts import open_artifact
from exporter.run.destination import Destination
from exporter.run.generic import check_generic
from exporter.run.stopwatch import Stopwatch
from tests.census.configs import seeded_model, tiny_config
from tests.tiny import CONFIGS, PROVENANCE


@pytest.fixture(scope="module")
def family() -> Architecture:
    return wiring_for(tiny_config("persimmon")).architecture


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rotate": "r1"}, "R1 is refused for persimmon: it is not in the architecture table"),
        ({"rotation.files": ["r1.pt"]}, "a file of rotations is refused"),
        ({"smoothing": "smoothquant"}, "--smoothing is refused"),
        ({"kv": "int8"}, "--kv is refused"),
        ({"prefix": 2}, "--prefix is refused"),
        ({"layerwise.enabled": True, "rotate": "none"}, "--layerwise is refused"),
    ],
)
def test_what_needs_wiring_is_refused(
    settings: dict[str, Any], words: str, family: Architecture
) -> None:
    recipe = load_recipe(None, settings)
    with pytest.raises(RotqError, match=words) as caught:
        check_generic(recipe, family, "export")
    assert caught.value.hint
    check_generic(recipe, wiring_for(CONFIGS["llama"]()).architecture, "export", verify=False)


def test_parity_cannot_be_left_out(family: Architecture) -> None:
    with pytest.raises(RotqError, match="only the parity check shows"):
        check_generic(load_recipe(None, {}), family, "export", verify=False)


def test_an_artifact_that_travelled_without_its_original_is_not_written(tmp_path: Path) -> None:
    config = tiny_config("persimmon")
    checkpoint, wiring = Checkpoint.from_module(seeded_model(config)), wiring_for(config)
    fused = fuse(checkpoint, wiring, RotationSet(), dtype=torch.float32, fold_norms=False)
    plan = resolve(scheme_named("int8-weight-only"), wiring)
    save_artifact(quantize_model(fused, plan, None, PROVENANCE), tmp_path)
    recipe = load_recipe(None, {"backend": "onnx"})
    destination = Destination.of(recipe)
    with pytest.raises(CheckpointError, match="original of the artifact is not at hand") as caught:
        open_artifact(tmp_path, recipe, None, destination, Stopwatch(silent), verify=True)
    assert caught.value.hint == "name it with -m/--model"


@pytest.mark.parametrize("goal", ["rotate", "capture"])
def test_there_is_nothing_to_fold(goal: str, family: Architecture) -> None:
    with pytest.raises(RotqError, match=f"nothing to {goal}"):
        check_generic(load_recipe(None, {}), family, goal)


def test_a_run_says_once_what_it_does_without(
    family: Architecture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_generic(load_recipe(None, {"rotate": "auto"}), family, "export")
    assert caplog.messages == [
        "persimmon: family not in the table: generic (no rotation, no smoothing)"
    ]


def test_bundles_are_refused() -> None:
    request = Request("vllm", config=portable_config(tiny_config("persimmon")))
    reasons = [found.reason for found in reasons_against(SafetensorsBackend(), request)]
    assert any("'persimmon'" in reason for reason in reasons)
