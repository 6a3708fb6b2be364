"""A head that holds the numbers of the embedding is stored once; parted by a fold, twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import MODEL_FILE
from calib.architectures import wiring_of
from calib.artifact import QuantizedModel
from tests.backends.onnx.whole import compare, quantized
from tests.tiny import CONFIGS
from tests.tolerances import WEIGHT_ONLY

TIED = ["llama-bias-tied-headdim", "gpt2", "granite", "gpt_neox-serial-nobias"]


def tied(name: str, **settings: Any) -> QuantizedModel:
    return quantized(CONFIGS[name](), ("r2", "r3", "r4"), **{"fold_norms": False, **settings})


def _tables(model: QuantizedModel) -> tuple[str, str]:
    """Keys of the token embedding and of the head."""
    wiring = wiring_of(model.config)
    return wiring.embeddings[0].weight, wiring.head.weight


@pytest.mark.parametrize("name", TIED)
def test_one_initializer_serves_both(name: str, tmp_path: Path) -> None:
    model = tied(name, scheme="int8-weight-only")
    embedding, head = _tables(model)
    assert torch.equal(model.floats[embedding], model.floats[head])
    assert compare(model, tmp_path).error <= WEIGHT_ONLY
    stored = {tensor.name: tensor for tensor in OnnxBackend().contents(tmp_path, "ort")}
    assert embedding in stored
    assert head not in stored
    # the turning is done when the graph is loaded, not on every run
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / MODEL_FILE, options, providers=["CPUExecutionProvider"])
    left = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    assert not [node.name for node in left if "TurnWeight" in node.name]


@pytest.mark.parametrize("settings", [{"fold_norms": True}, {"overrides": "embedding"}], ids=str)
def test_what_is_not_the_same_is_stored_twice(settings: dict[str, Any], tmp_path: Path) -> None:
    embedding, head = _tables(tied(TIED[0]))
    if "overrides" in settings:
        settings = {"overrides": {embedding.removesuffix(".weight"): "int8-weight-only"}}
    OnnxBackend().write(tied(TIED[0], **settings), tmp_path, WriteOptions("ort"))
    assert {embedding, head} <= {part.name for part in OnnxBackend().contents(tmp_path, "ort")}
