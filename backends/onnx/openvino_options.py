"""Settings of OpenVINO's CPU plugin: what is asked of it, and what it says that it does. Imported
only where OpenVINO is installed; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openvino as ov

DEVICE = "CPU"
AS_WRITTEN = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}
"""Float32 where the graph says float32, and inputs of weight-only linears left alone. Linears whose
inputs the graph itself quantizes run in integers either way, which changes no more than the order
of a sum."""
AS_A_USER: dict[str, str] = {}
"""What a user sets: nothing. OpenVINO then chooses precision, cache and groups by the CPU, and says
what it chose."""
_ASKED = (
    "INFERENCE_PRECISION_HINT",
    "KV_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "INFERENCE_NUM_THREADS",
    "NUM_STREAMS",
)
"""Properties of a compiled model that its numbers and its speed depend on."""


def version() -> str:
    """OpenVINO's release, without its build."""
    return str(ov.__version__).split("-", maxsplit=1)[0]


def settings(compiled: Any) -> dict[str, str]:
    """What is in force in a compiled model, as it says itself: a hint that the CPU cannot follow is
    not among it."""
    found = {name: compiled.get_property(name) for name in _ASKED}
    return {name: _word(value) for name, value in found.items()}


def chosen(properties: Mapping[str, str]) -> dict[str, str]:
    """What OpenVINO makes of ``properties`` on this CPU, asked of a model that does next to
    nothing."""
    x = ov.opset1.parameter([-1], ov.Type.f32)
    model = ov.Model([ov.opset1.add(x, x)], [x])
    return settings(ov.Core().compile_model(model, DEVICE, dict(properties)))


def _word(value: Any) -> str:
    """A property as OpenVINO spells it in its own configuration."""
    return str(value.get_type_name() if isinstance(value, ov.Type) else value)
