"""The artifact: a rotated, calibrated, quantized model, and the folder that it is saved as."""

from __future__ import annotations

from calib.artifact.casting import cast_model
from calib.artifact.files import load_artifact, save_artifact
from calib.artifact.model import (
    LINEAR_PARTS,
    OPTIONAL_PARTS,
    PARTS,
    LinearPart,
    Provenance,
    QuantizedCache,
    QuantizedLinear,
    QuantizedModel,
)

__all__ = [
    "LINEAR_PARTS",
    "OPTIONAL_PARTS",
    "PARTS",
    "LinearPart",
    "Provenance",
    "QuantizedCache",
    "QuantizedLinear",
    "QuantizedModel",
    "cast_model",
    "load_artifact",
    "save_artifact",
]
