"""ModelOpt configurations for rotq's schemes.

ModelOpt (0.47) takes ``{"quant_cfg": [entries], "algorithm": ...}``; each entry sets the quantizers whose dotted name
matches a pattern, and later entries win.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from calib.schemes import Granularity, NumberFormat, PerBlock, PerChannel, PerTensor, Scheme, TensorScheme


def modelopt_config(scheme: Scheme, modules: Iterable[str]) -> dict[str, Any]:
    """The configuration that quantizes exactly ``modules`` (dotted names) with ``scheme`` and nothing else."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for module in modules:
        entries.append(
            {"quantizer_name": f"{module}.weight_quantizer", "cfg": _quantizer(scheme.weight), "enable": True}
        )
        if scheme.activation is not None:
            entries.append(
                {"quantizer_name": f"{module}.input_quantizer", "cfg": _quantizer(scheme.activation), "enable": True}
            )
    return {"quant_cfg": entries, "algorithm": "max"}


def _quantizer(tensor: TensorScheme) -> dict[str, Any]:
    return {"num_bits": _num_bits(tensor.format), **_grouping(tensor.granularity)}


def _num_bits(fmt: NumberFormat) -> int | tuple[int, int]:
    """ModelOpt names integers by their width and floats by (exponent, mantissa) bits."""
    return (4, 3) if fmt.kind == "float" else fmt.bits


def _grouping(granularity: Granularity) -> dict[str, Any]:
    match granularity:
        case PerTensor():
            return {"axis": None}
        case PerChannel(axis):
            return {"axis": axis}
        case PerBlock(size):
            return {"block_sizes": {-1: size, "type": "static"}}
