"""AWQ's layout (AutoAWQ, ``gemm``): integers packed into words along the outputs, and turned.

w^T = (q - z) s,  of the input's group

qweight  int32 [in, out / 8]; the eight halves of bytes of a word, from the lowest on, are the
         outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight
qzeros   int32 [groups, out / 8], likewise
scales   [groups, out]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from calib.errors import CheckpointError
from calib.network.quantized.weight import Header, Weight, bits_of, malformed, matrix, part

if TYPE_CHECKING:
    from torch import Tensor

_BITS = 4
_IN_WORD = 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PACKED = ".qweight"


def weights(stored: Mapping[str, Header], settings: Mapping[str, object]) -> Iterator[Weight]:
    """See :data:`~calib.network.quantized.weight.Reader`."""
    bits_of(settings, "bits", (_BITS,))
    version = settings.get("version", "gemm")
    if version != "gemm":
        raise CheckpointError(
            f"the quantization_config says version = {version!r:.40}, and of AWQ rotq reads gemm",
            hint="start from the floating-point checkpoint that it was made from",
        )
    for packed in stored:
        if not packed.endswith(_PACKED):
            continue
        module = packed.removesuffix(_PACKED)
        name = f"{module}.weight"
        columns, words = matrix(stored, packed)
        rows = words * _IN_WORD
        scales = part(stored, f"{module}.scales", name)
        groups, outputs = matrix(stored, scales)
        if outputs != rows or groups == 0 or columns % groups:
            raise malformed(
                name, f"{scales} has shape {[groups, outputs]} for a weight {[rows, columns]}"
            )
        zeros = part(stored, f"{module}.qzeros", name, (groups, words))
        parts = {"packed": packed, "scale": scales, "zero": zeros}
        yield Weight(name, (rows, columns), parts, _decoded)


def _decoded(parts: Mapping[str, Tensor]) -> Tensor:
    scale = parts["scale"].float()
    codes, zero = _halves(parts["packed"]), _halves(parts["zero"])
    size = codes.shape[0] // scale.shape[0]
    turned = (codes - zero.repeat_interleave(size, 0)) * scale.repeat_interleave(size, 0)
    return turned.mT.contiguous()


def _halves(words: Tensor) -> Tensor:
    """int32 ``[n, m]`` to float32 ``[n, 8 m]``, in the order of the outputs."""
    import torch  # here, because it takes seconds to import

    from calib.network.quantized.bits import unpacked

    stored = unpacked(words[..., None], _BITS, _IN_WORD)
    return stored[..., torch.tensor(_ORDER).argsort()].flatten(-2).float()
