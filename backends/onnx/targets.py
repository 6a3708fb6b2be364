"""What each ONNX target expresses, as data. Torch-free, for ``rotq backends``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_FLOAT8 = "ONNX Runtime's CPU provider has no float8 kernels, and its optimizer fails to load such a graph"


@dataclass(frozen=True)
class Target:
    """A runtime profile of the ONNX backend."""

    compute_dtype: str
    opset: int
    refusals: Mapping[str, str]
    """Scheme -> why this target cannot express it."""


TARGETS: Mapping[str, Target] = {
    "ort": Target(compute_dtype="float32", opset=21, refusals={"float8": _FLOAT8}),
}
