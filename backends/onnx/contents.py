"""What a written graph holds, tensor by tensor."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir

from backends.base import ContentKind, StoredTensor
from backends.onnx.files import read_proto, unreadable
from backends.onnx.names import SCALE_ENDING, ZERO_POINT, Part, initializer_name
from calib.files.reading import reason_of

_KINDS: tuple[tuple[str, ContentKind], ...] = (
    (SCALE_ENDING, "scale"),
    (ZERO_POINT, "zero point"),
    (initializer_name("", Part.WEIGHT), "float weight"),
    (initializer_name("", Part.BIAS), "float weight"),
)
"""Kinds by what the initializers' names end with or hold; a weight is quantized where its elements
are a byte or less. The last part of a name may be a dtype or a number (``zero_point.int8``)."""
_BYTE = 8


def contents(path: Path) -> list[StoredTensor]:
    """Every initializer of the graph at ``path``, in its order.

    Raises:
        BackendError: the file or its data is missing or damaged.
    """
    tensors = []
    for tensor in read_proto(path).graph.initializer:
        try:
            dtype = ir.DataType(tensor.data_type)
            bits = math.prod(tensor.dims) * dtype.bitwidth
        except (ValueError, TypeError) as error:  # no such type, or one without a width
            raise unreadable(path, f"'{tensor.name}': {reason_of(error)}") from error
        kind = _kind(tensor.name, dtype)
        tensors.append(
            StoredTensor(
                tensor.name, kind, dtype.name.lower(), tuple(tensor.dims), -(-bits // _BYTE)
            )
        )

    return tensors


def _kind(name: str, dtype: ir.DataType) -> ContentKind:
    for part, kind in _KINDS:
        if name.endswith(part) or f"{part}." in name:
            return (
                "quantized weight" if kind == "float weight" and dtype.bitwidth <= _BYTE else kind
            )
    return "other"
