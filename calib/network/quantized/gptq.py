"""GPTQ's layout (AutoGPTQ, GPTQModel): integers packed into words along the inputs, and turned.

w^T = (q - z) s,  of the input's group

qweight  int32 [in bits / 32, out]
qzeros   int32 [groups, out bits / 32]: z - 1; z itself where checkpoint_format is gptq_v2
scales   [groups, out]
g_idx    int32 [in]: the group of each input; without it neighbours
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from calib.network.quantized.weight import Header, Weight, bits_of, malformed, matrix, part

if TYPE_CHECKING:
    from torch import Tensor

_KNOWN = (2, 3, 4, 8)
_WORD = 32
_PACKED = ".qweight"


def weights(stored: Mapping[str, Header], settings: Mapping[str, object]) -> Iterator[Weight]:
    """See :data:`~calib.network.quantized.weight.Reader`."""
    bits = bits_of(settings, "bits", _KNOWN)
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    for packed in stored:
        if not packed.endswith(_PACKED):
            continue
        module = packed.removesuffix(_PACKED)
        name = f"{module}.weight"
        words, rows = matrix(stored, packed)
        columns = words * _WORD // bits
        scales = part(stored, f"{module}.scales", name)
        groups, outputs = matrix(stored, scales)
        if outputs != rows or groups == 0:
            raise malformed(name, f"{scales} has shape {[groups, outputs]} for {rows} outputs")
        zeros = part(stored, f"{module}.qzeros", name, (groups, rows * bits // _WORD))
        parts = {"packed": packed, "scale": scales, "zero": zeros}
        order = f"{module}.g_idx"
        if order in stored:
            parts["order"] = part(stored, order, name, (columns,))
        elif columns % groups:
            raise malformed(name, f"its {columns} inputs are not {groups} groups")
        yield Weight(name, (rows, columns), parts, partial(_decoded, bits=bits, offset=offset))


def _decoded(parts: Mapping[str, Tensor], bits: int, offset: int) -> Tensor:
    import torch  # here, because it takes seconds to import

    from calib.network.quantized.bits import unpacked

    scale = parts["scale"].float()
    groups, rows = scale.shape
    columns = parts["packed"].shape[0] * _WORD // bits
    codes = unpacked(parts["packed"].mT, bits, columns).float()
    # z - 1 is stored in as many bits as there are, so that z = 0 is the largest of them
    zero = (unpacked(parts["zero"], bits, rows) + offset).remainder(2**bits).float()
    order = parts.get("order", torch.arange(columns) // max(columns // groups, 1)).long()
    return (codes - zero[order].mT) * scale[order].mT
