"""ModelOpt's INT4: two outputs in a byte.

w = q s p,  q signed

weight           uint8 [out / 2, in]: q of output 2 j in the low half of byte j
weight_scale     [out, in / group]
pre_quant_scale  [in]: p, which the input is multiplied by where AWQ found no norm to fold it
                 into
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from calib.network.quantized.weight import Header, Weight, malformed, matrix, part

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHT = ".weight"


def weights(stored: Mapping[str, Header], settings: Mapping[str, object]) -> Iterator[Weight]:
    """See :data:`~calib.network.quantized.weight.Reader`."""
    for name in stored:
        if not name.endswith(_WEIGHT) or stored[name].dtype != "U8":
            continue
        pairs, columns = matrix(stored, name)
        scale = part(stored, f"{name}_scale", name)
        rows, groups = matrix(stored, scale)
        if stored[scale].dtype.startswith("F8") or f"{name}_scale_2" in stored:
            raise malformed(name, "of ModelOpt's formats of four bits rotq reads INT4 alone")
        if rows != 2 * pairs or groups == 0 or columns % groups:
            raise malformed(
                name, f"{scale} has shape {[rows, groups]} for bytes {[pairs, columns]}"
            )
        parts = {"weight": name, "scale": scale}
        factors = f"{name.removesuffix(_WEIGHT)}.pre_quant_scale"
        if factors in stored:
            parts["factors"] = part(stored, factors, name, (columns,))
        yield Weight(name, (rows, columns), parts, _decoded)


def _decoded(parts: Mapping[str, Tensor]) -> Tensor:
    import torch  # here, because it takes seconds to import

    packed, scale = parts["weight"], parts["scale"].float()
    halves = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1).float()
    signed = torch.where(halves > 7, halves - 16, halves)
    weight = signed * scale.repeat_interleave(signed.shape[1] // scale.shape[1], dim=1)
    return weight * parts["factors"].float() if "factors" in parts else weight
