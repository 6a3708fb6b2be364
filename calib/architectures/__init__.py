"""The architecture table: which weight of which model family reads and writes which space."""

from __future__ import annotations

from calib.architectures.architecture import Architecture, Refusal
from calib.architectures.groups import merged_linears, reading_groups
from calib.architectures.lookup import architecture_for, supported_model_types
from calib.architectures.spec import (
    KINDS,
    SPACE_OF,
    Dimensions,
    EmbeddingSpec,
    Kind,
    LinearSpec,
    NormSpec,
    Part,
    Site,
    Space,
)
from calib.architectures.wiring import Wiring, architecture_of, wiring_for, wiring_of

__all__ = [
    "KINDS",
    "SPACE_OF",
    "Architecture",
    "Dimensions",
    "EmbeddingSpec",
    "Kind",
    "LinearSpec",
    "NormSpec",
    "Part",
    "Refusal",
    "Site",
    "Space",
    "Wiring",
    "architecture_for",
    "architecture_of",
    "merged_linears",
    "reading_groups",
    "supported_model_types",
    "wiring_for",
    "wiring_of",
]
