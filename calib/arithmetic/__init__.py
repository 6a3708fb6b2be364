"""Grids, scales and rounding: what a quantized number stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.arithmetic.grids import (
        Grid,
        dequantize,
        grid_of,
        quantize,
        round_to_grid,
        weight_grid,
        weight_limits,
    )
    from calib.arithmetic.inputs import fake_quantize_input, input_grid
    from calib.arithmetic.rounding import decode, encode, round_to_format
    from calib.arithmetic.scales import compute_scale, convert_to_scale

__all__ = [
    "Grid",
    "compute_scale",
    "convert_to_scale",
    "decode",
    "dequantize",
    "encode",
    "fake_quantize_input",
    "grid_of",
    "input_grid",
    "quantize",
    "round_to_format",
    "round_to_grid",
    "weight_grid",
    "weight_limits",
]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "grids": (
                "Grid",
                "dequantize",
                "grid_of",
                "quantize",
                "round_to_grid",
                "weight_grid",
                "weight_limits",
            ),
            "inputs": (
                "fake_quantize_input",
                "input_grid",
            ),
            "rounding": (
                "decode",
                "encode",
                "round_to_format",
            ),
            "scales": (
                "compute_scale",
                "convert_to_scale",
            ),
        },
    )
