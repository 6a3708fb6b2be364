"""``pack-quantized`` of compressed-tensors: integers packed into words, along the inputs.

w = (q - z) s,  q and z unsigned

weight_packed      int32 [out, ceil(in bits / 32)], bit i of the row's stream as in
                   :func:`~calib.network.quantized.bits.unpacked`
weight_scale       [], [1], [out, 1] or [out, in / group]
weight_shape       int64 [2]: out, in
weight_zero_point  int32 [ceil(out bits / 32), groups], packed along the outputs; without it
                   z = 2^(bits - 1)
weight_g_idx       int32 [in]: the group of each input, where they are no neighbours
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from calib.network.quantized.weight import (
    Header,
    Weight,
    bits_of,
    malformed,
    matrix,
    part,
    weight_settings,
)

if TYPE_CHECKING:
    from torch import Tensor

_KNOWN = tuple(range(1, 9))
_WORD = 32
_PACKED = ".weight_packed"


def weights(stored: Mapping[str, Header], settings: Mapping[str, object]) -> Iterator[Weight]:
    """See :data:`~calib.network.quantized.weight.Reader`."""
    for packed in stored:
        if not packed.endswith(_PACKED) or stored[packed].dtype != "I32":
            continue
        module = packed.removesuffix(_PACKED)
        name = f"{module}.weight"
        bits = _bits(settings)
        rows, words = matrix(stored, packed)
        scale = part(stored, f"{module}.weight_scale", name)
        parts = {"packed": packed, "scale": scale}
        parts["shape"] = part(stored, f"{module}.weight_shape", name, (2,))
        groups = _groups(name, rows, stored[scale].shape)
        columns = _columns(name, (rows, words), bits, groups, stored[parts["shape"]].values)
        zero, order = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
        if zero in stored:
            parts["zero"] = part(stored, zero, name, (-(-rows * bits // _WORD), groups))
        if order in stored:
            parts["order"] = part(stored, order, name, (columns,))
        yield Weight(name, (rows, columns), parts, partial(_decoded, columns=columns, bits=bits))


def _bits(settings: Mapping[str, object]) -> int:
    """The one number of bits of all groups."""
    found = [each.get("num_bits") for each in weight_settings(settings)]
    one = found[0] if found and all(bits == found[0] for bits in found) else None
    return bits_of({"num_bits": one}, "num_bits", _KNOWN)


def _groups(name: str, rows: int, grid: tuple[int, ...]) -> int:
    if grid in ((), (1,), (rows,)):
        return 1
    if len(grid) == 2 and grid[0] in (1, rows) and grid[1] > 0:
        return grid[1]
    raise malformed(name, f"scales of shape {list(grid)} do not fit its {rows} rows")


def _columns(
    name: str, packed: tuple[int, int], bits: int, groups: int, said: tuple[int, ...] | None
) -> int:
    """How many inputs there are; the last word of a row may be filled in part.

    Args:
        name: of the weight, for messages.
        packed: its rows, and the words in each.
        bits: of a number.
        groups: how many there are, all of one size.
        said: what ``weight_shape`` says; without it, as many as the words and ``groups`` allow.

    Raises:
        CheckpointError: they do not fit each other.
    """
    rows, words = packed
    most, fewer = words * _WORD // bits, (words - 1) * _WORD // bits
    if said is not None and (said[0] != rows or not fewer < said[1] <= most):
        raise malformed(
            name,
            f"{name}_shape says {list(said)}, and {rows} rows of {words} words hold {fewer + 1} to"
            f" {most} numbers each",
        )
    columns = most - most % groups if said is None else said[1]
    if columns % groups or columns <= fewer:
        count = most if said is None else columns
        raise malformed(name, f"its {count} inputs are not {groups} groups")
    return columns


def _decoded(parts: Mapping[str, Tensor], columns: int, bits: int) -> Tensor:
    from calib.network.quantized.bits import unpacked  # here, because torch takes seconds to import

    packed, scale = parts["packed"], parts["scale"].float()
    rows = packed.shape[0]
    codes = unpacked(packed, bits, columns).float()
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    groups = scale.shape[1]
    if "zero" in parts:
        zero = unpacked(parts["zero"].mT, bits, rows).mT.float()
    else:
        zero = scale.new_full((1, groups), float(2 ** (bits - 1)))
    if "order" in parts:
        order = parts["order"].long()
        return (codes - zero[:, order]) * scale[:, order]
    grouped = codes.reshape(rows, groups, -1)
    return ((grouped - zero[..., None]) * scale[..., None]).reshape(rows, columns)
