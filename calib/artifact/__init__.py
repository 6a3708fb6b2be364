"""The artifact: a rotated, calibrated, quantized model, and the folder that it is saved as.

Each name loads what it needs on first use, so that :mod:`calib.artifact.side_files` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
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
    from calib.artifact.prefix import Prefix, load_prefix, save_prefix

__all__ = [
    "LINEAR_PARTS",
    "OPTIONAL_PARTS",
    "PARTS",
    "LinearPart",
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

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "casting": ("cast_model",),
            "files": ("load_artifact", "save_artifact"),
            "model": (
                "LINEAR_PARTS",
                "OPTIONAL_PARTS",
                "PARTS",
                "LinearPart",
                "Provenance",
                "QuantizedCache",
                "QuantizedLinear",
                "QuantizedModel",
            ),
            "prefix": ("Prefix", "load_prefix", "save_prefix"),
        },
    )
