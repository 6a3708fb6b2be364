"""MXFP4 of gpt-oss: experts in blocks of 32 numbers along the inputs.

    w = 2^(e - 127) q

    {parameter}_blocks  uint8 [experts, out, in / 32, 16], two E2M1 numbers in a byte
    {parameter}_scales  uint8 [experts, out, in / 32]: e

The float parameter is stored turned, ``[experts, in, out]``, as transformers' module tree has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from calib.network.quantized.weight import Header, Weight, malformed, part

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS = "_blocks"
_IN_BLOCK = 32
_EXPONENT_BIAS = 127


def weights(stored: Mapping[str, Header], settings: Mapping[str, object]) -> Iterator[Weight]:
    """See :data:`~calib.network.quantized.weight.Reader`."""
    for blocks in stored:
        if not blocks.endswith(_BLOCKS):
            continue
        name = blocks.removesuffix(_BLOCKS)
        shape = stored[blocks].shape
        if len(shape) != 4 or shape[3] != _IN_BLOCK // 2 or stored[blocks].dtype != "U8":
            raise malformed(
                name, f"{blocks} is {stored[blocks].dtype} {list(shape)}, expected U8 [e, o, b, 16]"
            )
        parts = {"blocks": blocks, "scales": part(stored, f"{name}_scales", name, shape[:3])}
        yield Weight(name, (shape[0], shape[2] * _IN_BLOCK, shape[1]), parts, _decoded)


def _decoded(parts: Mapping[str, Tensor]) -> Tensor:
    import torch  # here, because it takes seconds to import

    from calib.network.quantized.bits import fp4_values

    factors = torch.exp2(parts["scales"].float() - _EXPONENT_BIAS)
    # one expert at a time: the whole in float32 is eight times what is stored
    experts = [
        (fp4_values(blocks) * scales[..., None]).flatten(-2).mT.contiguous()
        for blocks, scales in zip(parts["blocks"], factors, strict=True)
    ]
    return torch.stack(experts)
