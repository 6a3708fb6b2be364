"""Names of the nodes and initializers of a linear: what lowering gives, reading looks for by.

A node is called ``{linear}/{label}``, an initializer ``{linear}.{part}``. Linears that are one
MatMul (:mod:`backends.onnx.packing`) are one linear here, under their names joined.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

METADATA_KEY = "rotq.linears"
"""In the graph's metadata: the description of every quantized linear, by name."""
CACHE_METADATA_KEY = "rotq.cache"
"""The same of the KV cache: its scheme and layers."""
_JOINT = "|"


class Label(StrEnum):
    """What the nodes of a linear are called, in the order of a run."""

    UNSQUEEZE = "Unsqueeze"
    WIDTH = "Width"
    QUANTIZE_INPUT = "QuantizeInput"
    DEQUANTIZE_INPUT_SCALE = "DequantizeInputScale"
    DEQUANTIZE_INPUT = "DequantizeInput"
    CAST_INPUT = "CastInput"
    ORDER = "Order"
    PAD = "Pad"
    BARRIER = "Barrier"
    DEQUANTIZE_WEIGHT_SCALE = "DequantizeWeightScale"
    DEQUANTIZE_WEIGHT = "DequantizeWeight"
    CAST_WEIGHT = "CastWeight"
    TURN_WEIGHT = "TurnWeight"
    MATMUL = "MatMul"
    ADD = "Add"
    SQUEEZE = "Squeeze"
    SPLIT = "Split"


ROTATION_FACTOR = "Factor"
"""What the labels of an online rotation's products begin with; see :mod:`backends.onnx.rotate`."""


class Part(StrEnum):
    """What the initializers of a linear or a table are called."""

    WEIGHT = "weight"
    WEIGHT_SCALE = "weight_scale"
    WEIGHT_SECOND_SCALE = "weight_second_scale"
    WEIGHT_ZERO_POINT = "weight_zero_point"
    WEIGHT_ORDER = "weight_order"
    INPUT_SCALE = "input_scale"
    INPUT_ZERO_POINT = "input_zero_point"
    BIAS = "bias"


SCALE_ENDING = "_scale"
"""How the names of all scales end, those of the cache as well."""
ZERO_POINT = "zero_point"
"""How the names of all zero points end; with the storage type behind, the name of one that several
linears share."""
SHARED_BARRIER = "barrier"
"""What the zeros of a barrier are called, which linears share."""


def node_name(linear: str, label: Label) -> str:
    """The name of a node of ``linear``."""
    return f"{linear}/{label}"


def linear_of(node: str, label: Label) -> str | None:
    """The linear whose ``label`` the node called ``node`` is; ``None`` if it is none."""
    linear = node.removesuffix(f"/{label}")
    return None if linear == node else linear


def initializer_name(linear: str, part: Part) -> str:
    """The name of an initializer of ``linear``."""
    return f"{linear}.{part}"


def joint_name(names: Iterable[str]) -> str:
    """What a pack of linears is called."""
    return _JOINT.join(names)


def members(name: str) -> list[str]:
    """The linears of the pack ``name``; a linear that is in none is its own."""
    return name.split(_JOINT)
