"""Which linears stay in float, and why."""

from __future__ import annotations

from collections.abc import Collection

from calib.fusing import FusedModel

KEPT_HEAD = "output head: float unless asked for"
KEPT_ROUTER = "router or gate: decides which experts run, and is tiny"


def kept_reasons(fused: FusedModel, quantized: Collection[str]) -> dict[str, str]:
    """Why each linear that is not in ``quantized`` stays in float, by module name.

    A 3-D expert parameter is quantized where its experts are, which have names of their own.
    """
    head = fused.wiring.head.name
    specs = fused.wiring.linears
    kept = (
        spec.name
        for spec in specs
        if spec.name not in quantized and f"{spec.name}.0" not in quantized
    )
    return {name: KEPT_HEAD if name == head else KEPT_ROUTER for name in kept}
