"""ModelOpt configurations for rotq's schemes.

ModelOpt (0.47) takes ``{"quant_cfg": [entries], "algorithm": ...}``; each entry sets the quantizers
whose dotted name matches a pattern, and later entries win.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calib.errors import QuantizationError
from calib.schemes import (
    LinearScheme,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerTensor,
    PerToken,
    TensorScheme,
)

_SCALE_BITS = {"e4m3": (4, 3), "e8m0": (8, 0)}


def modelopt_config(
    weights: Mapping[str, TensorScheme], inputs: Mapping[str, TensorScheme]
) -> dict[str, Any]:
    """The configuration that quantizes exactly these weights and inputs, by module name, and
    nothing else.

    Raises:
        QuantizationError: ModelOpt has no such quantizer.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for kind, schemes in (("weight", weights), ("input", inputs)):
        for module, scheme in schemes.items():
            cfg = _quantizer(scheme)
            entries.append(
                {"quantizer_name": f"{module}.{kind}_quantizer", "cfg": cfg, "enable": True}
            )
    return {"quant_cfg": entries, "algorithm": "max"}


def modelopt_calibrates(scheme: TensorScheme) -> bool:
    """Whether the amax that ModelOpt collects is all that has to be known of an input."""
    per_tensor = isinstance(scheme.granularity, PerTensor) or scheme.scale_format == "e4m3"
    return scheme.symmetric and scheme.needs_calibration and per_tensor


def config_of(schemes: Mapping[str, LinearScheme]) -> dict[str, Any]:
    """The configuration of whole linears."""
    inputs = {name: scheme.input for name, scheme in schemes.items() if scheme.input is not None}
    return modelopt_config({name: scheme.weight for name, scheme in schemes.items()}, inputs)


def _quantizer(scheme: TensorScheme) -> dict[str, Any]:
    if not scheme.symmetric:
        raise QuantizationError(
            "ModelOpt's integer quantizers have no zero point", hint="use a symmetric scheme"
        )
    return {"num_bits": num_bits(scheme.format), **_grouping(scheme)}


def num_bits(fmt: NumberFormat) -> int | tuple[int, int]:
    """ModelOpt names integers by their width and floats by (exponent, mantissa) bits."""
    if fmt.kind == "integer":
        return fmt.bits
    return (4, 3) if fmt.bits == 8 else (2, 1)


def _grouping(scheme: TensorScheme) -> dict[str, Any]:
    match scheme.granularity:
        case PerTensor():
            return {"axis": None}
        case PerChannel(axis):
            return {"axis": axis}
        case PerToken():
            return {"block_sizes": {-1: None}, "type": "dynamic"}
        case PerBlock(size) if scheme.scale_format == "compute":
            return {"block_sizes": {-1: size, "type": "static"}}
        case PerBlock(size) if scheme.scale_format in _SCALE_BITS:
            # ModelOpt computes these block scales while running, of weights as of activations.
            bits = _SCALE_BITS[scheme.scale_format]
            return {"block_sizes": {-1: size, "type": "dynamic", "scale_bits": bits}, "axis": None}
        case _:
            raise QuantizationError(
                f"ModelOpt has no quantizer {scheme.granularity} with {scheme.scale_format} scales"
            )
