"""Checkpoints that exist only quantized, read as the float weights that they stand for.

What is quantized how follows from ``quantization_config`` and the headers of the tensors alone, so
that a plan knows it too. A weight is computed when it is asked for, from its own stored tensors, in
float32. Imports no torch before that.
"""

from __future__ import annotations

from calib.network.quantized.formats import Decoded, Quantization, quantization_of
from calib.network.quantized.view import Computed, with_floats
from calib.network.quantized.weight import Header, Weight

__all__ = [
    "Computed",
    "Decoded",
    "Header",
    "Quantization",
    "Weight",
    "quantization_of",
    "with_floats",
]
