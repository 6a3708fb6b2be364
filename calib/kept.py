"""Which linears stay in float, and why."""

from __future__ import annotations

from collections.abc import Collection

from calib.architectures import LinearSpec
from calib.fusing import FusedModel

KEPT_HEAD = "output head: float unless asked for"
KEPT_EXPERTS = "fused expert parameters: not quantized yet"
KEPT_ROUTER = "router or gate: decides which experts run, and is tiny"


def kept_reasons(fused: FusedModel, quantized: Collection[str]) -> dict[str, str]:
    """Why each linear that is not in ``quantized`` stays in float, by module name."""
    specs = fused.architecture.all_linears(fused.config)
    return {spec.name: _reason(spec, fused) for spec in specs if spec.name not in quantized}


def _reason(spec: LinearSpec, fused: FusedModel) -> str:
    if spec.name == fused.architecture.head.name:
        return KEPT_HEAD
    return KEPT_EXPERTS if spec.layout == "experts" else KEPT_ROUTER
