"""The artifact: a rotated, calibrated, quantized model, and the folder that it is saved as."""

from __future__ import annotations

from calib.artifact.casting import cast_model
from calib.artifact.files import load_artifact, save_artifact
from calib.artifact.model import (
    LINEAR_PARTS,
    Provenance,
    QuantizedCache,
    QuantizedLinear,
    QuantizedModel,
)
from calib.artifact.prefix import Prefix, load_prefix, save_prefix

__all__ = [
    "LINEAR_PARTS",
    "Prefix",
    "Provenance",
    "QuantizedCache",
    "QuantizedLinear",
    "QuantizedModel",
    "cast_model",
    "load_artifact",
    "load_prefix",
    "save_artifact",
    "save_prefix",
]
