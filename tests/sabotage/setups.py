"""Models, backends and schemes that faults are put into. Tiny: one takes a second or two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from tests.checkpoints import TINY, write_checkpoint

FEW: dict[str, Any] = {
    "rotate": "r1,r2,r4",
    "calibration.nsamples": 12,
    "calibration.seqlen": 64,
    "gate.nsamples": 2,
    "evaluation.nsamples": 6,
    "rotation.r1_tokens": 512,
    "rotation.r2_tokens": 128,
    "rotation.r1.epochs": 1,
    "rotation.r2.epochs": 1,
}
_SAFE = {"backend": "safetensors", "rotate": "r1,r2"}
SETUPS: Mapping[str, Mapping[str, Any]] = {
    "onnx int8": {"scheme": "int8"},
    "onnx int8, kv int8": {"scheme": "int8", "kv": "int8"},
    "onnx int8, biases": {"scheme": "int8", "model": "qwen2"},
    "onnx int8 weights": {"scheme": "int8-weight-only"},
    "onnx int4 weights": {"scheme": "int4-weight-only", "weights.block_size": 16},
    "tensorrt w4a8": {
        **_SAFE,
        "target": "tensorrt",
        "scheme": "w4a8",
        "weights.block_size": 16,
        "rotate": "r1,r2,r4",
    },
    "tripy int8": {**_SAFE, "target": "tripy", "scheme": "int8", "rotate": "r1,r2,r4"},
    "tripy int4 weights": {
        **_SAFE,
        "target": "tripy",
        "scheme": "int4-weight-only",
        "weights.block_size": 16,
    },
    "modelopt float8": {**_SAFE, "target": "modelopt", "scheme": "float8"},
    "modelopt int4 weights": {
        **_SAFE,
        "target": "modelopt",
        "scheme": "int4-weight-only",
        "weights.block_size": 16,
    },
    "vllm int8": {**_SAFE, "target": "vllm", "scheme": "int8", "rotate": "r1,r2,r4"},
    "transformers int8": {**_SAFE, "target": "transformers", "scheme": "int8"},
    "transformers int4 weights": {
        **_SAFE,
        "target": "transformers",
        "scheme": "int4-weight-only",
        "weights.block_size": 16,
    },
}
_SIZES = {"hidden_size": 64, "intermediate_size": 96}


def write_models(folder: Path) -> dict[str, Path]:
    """The checkpoints of the setups, by what their ``model`` says; all widths are whole blocks."""
    qwen = transformers.Qwen2Config(**{**TINY, **_SIZES})
    return {
        "llama": write_checkpoint(folder / "llama", **_SIZES),
        "qwen2": write_checkpoint(folder / "qwen2", qwen),
    }


def settings(setup: str, models: Mapping[str, Path]) -> dict[str, Any]:
    """What a recipe says of ``setup``."""
    changes = {**FEW, **SETUPS[setup]}
    changes["model"] = str(models[changes.get("model", "llama")])
    return changes
