"""Linears that read one value as one MatMul: query, key and value, and gate and up.

    x W_q^T, x W_k^T, x W_v^T  =  Split(x [W_q; W_k; W_v]^T)

Scales of output channels and of blocks lie beside each other as the weights do, so every number
stays what it was. One token at a time, a runtime spends a tenth of a layer on starting kernels of
small matrices. But taking the outputs apart again copies them, which is why integer products of
large matrices stay apart.

In the graph a pack bears the names of its linears, joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from backends.onnx.names import Part, joint_name, members
from backends.rows import joined, rows_of
from calib.artifact import QuantizedLinear
from calib.schemes import PerBlock, PerChannel

_SHARED = (Part.INPUT_SCALE, Part.INPUT_ZERO_POINT, Part.WEIGHT_ORDER)
"""Parts that the linears of a pack must have in common."""


def packs(linears: Sequence[QuantizedLinear]) -> list[list[QuantizedLinear]]:
    """``linears``, which read one value, by those that one MatMul computes: they fit, and it gains
    by them.
    """
    groups: list[list[QuantizedLinear]] = []
    for linear in linears:
        fitting = next((pack for pack in groups if _fit(pack[0], linear)), None)
        if fitting is None:
            groups.append([linear])
        else:
            fitting.append(linear)

    return [
        part
        for pack in groups
        for part in ([pack] if _gains(pack) else [[linear] for linear in pack])
    ]


def packed(linears: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One linear whose rows are those of ``linears`` in turn; its weight is not made: it is on the
    meta device.
    """
    if len(linears) == 1:
        return linears[0]
    first = linears[0].weight
    outputs = sum(len(linear.weight) for linear in linears)
    weight = torch.empty((outputs, first.shape[1]), dtype=first.dtype, device="meta")
    return replace(
        joined(linears, weight=weight), name=joint_name(linear.name for linear in linears)
    )


def unpacked(pack: QuantizedLinear, sizes: Sequence[int]) -> list[QuantizedLinear]:
    """The inverse of :func:`packed`, of a pack whose weight is there.

    Args:
        pack: read back from a graph.
        sizes: rows of each of its linears.
    """
    ends = list(accumulate(sizes))
    rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [
        replace(rows_of(pack, part), name=name)
        for name, part in zip(members(pack.name), rows, strict=True)
    ]


def _fit(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    """Whether both can be rows of one weight: the same grid, the same input, and scales that lie by
    rows.
    """
    return (
        one.weight_scheme == other.weight_scheme
        and one.weight_scheme.scale_format == "compute"
        and isinstance(one.weight_scheme.granularity, PerBlock | PerChannel)
        and one.weight_scheme.granularity != PerChannel(1)
        and one.input_scheme == other.input_scheme
        and one.online_rotation == other.online_rotation
        and (one.bias is None) == (other.bias is None)
        and all(_equal(getattr(one, part), getattr(other, part)) for part in _SHARED)
    )


def _gains(pack: Sequence[QuantizedLinear]) -> bool:
    """Whether one MatMul is faster than one for each of ``pack``.

    Over a prompt, integer products are so fast that the Split of wide outputs, such as gate and up,
    costs more than one large product saves. Keys and values of grouped queries are too small to
    occupy all threads by themselves, and do gain. Weight-only linears gain one token at a time,
    whatever their size.
    """
    return pack[0].input_scheme is None or any(
        len(linear.weight) < linear.weight.shape[1] for linear in pack
    )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
