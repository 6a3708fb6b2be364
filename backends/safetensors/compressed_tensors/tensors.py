"""The tensors of one linear: what :mod:`backends.safetensors.compressed_tensors.schemes` says, key
by key, and back.

    per tensor    weight_scale [1]            NVFP4:  weight_global_scale = 1 / s2,
    input_global_scale = 1 / s2 per channel   weight_scale [out, 1]       MX:     weight_scale = 127
    + log2(s) per block     weight_scale [out, blocks]

Scales are in the artifact's dtype. Zero points of packed weights are packed as well, along the
outputs. A reciprocal in float32 is not undone by another one to the last bit: what comes back of
NVFP4's second level is ``1 / (1 / s2)``, which is what a reader of the format computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backends.base import ContentKind
from backends.safetensors.compressed_tensors.packing import (
    pack_integers,
    pack_nibbles,
    unpack_integers,
    unpack_nibbles,
)
from backends.safetensors.compressed_tensors.schemes import Compression, form_of
from backends.safetensors.layout import Entry, in_parts
from calib.artifact import QuantizedLinear
from calib.schemes import (
    FLOAT4,
    Granularity,
    PerBlock,
    PerTensor,
    TensorScheme,
    tensor_scheme_from_dict,
)

_EXPONENT_BIAS = 127
_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Part:
    """One tensor of a linear."""

    name: str
    """What follows the module's name and a dot in its key."""
    kind: ContentKind
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def at(self, module: str) -> Entry:
        """As the tensor of ``module``."""
        return Entry(f"{module}.{self.name}", self.kind, self.dtype, self.shape, self.read)


def parts_of(linear: QuantizedLinear, *, transposed: bool = False) -> Iterator[Part]:
    """The tensors of ``linear``, bias included.

    Args:
        linear: the linear, or the rows of one that a module of its own holds.
        transposed: store a weight that is not packed as ``[in, out]``.

    Raises:
        BackendError: it has no place in the format.
    """
    compression = form_of(linear).compression
    yield from _weight(linear, compression, transposed=transposed)
    yield from _weight_scales(linear, compression)
    if linear.weight_zero_point is not None:
        yield _zero_points(linear, linear.weight_zero_point, compression)
    yield from _input(linear)
    if linear.bias is not None:
        yield _stored("bias", "float weight", linear.bias, tuple(linear.bias.shape))


def linear_from(
    name: str,
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    transposed: bool = False,
) -> QuantizedLinear:
    """The inverse of :func:`parts_of`.

    Args:
        name: of the linear in the source model.
        described: its description.
        tensors: its tensors by what follows the module's name.
        transposed: as it was written.

    Raises:
        KeyError: a tensor is missing.
    """
    scheme = tensor_scheme_from_dict(dict(described["weight"]))
    input_scheme = (
        None if described["input"] is None else tensor_scheme_from_dict(dict(described["input"]))
    )
    weight = _unpacked(tensors, scheme)
    if transposed and "weight" in tensors:
        weight = weight.T.contiguous()
    scale = _unpacked_scale(tensors["weight_scale"], scheme)
    second, bias = tensors.get("weight_global_scale"), tensors.get("bias")

    return QuantizedLinear(
        name=name,
        weight=weight,
        weight_scale=scale,
        weight_scheme=scheme,
        bias=bias,
        input_scheme=input_scheme,
        online_rotation=described["online_rotation"],
        weight_zero_point=_unpacked_zero_points(
            tensors.get("weight_zero_point"), scheme, scale, weight.shape[0]
        ),
        weight_second_scale=None if second is None else second.reciprocal().reshape(()),
        **_input_from(tensors, input_scheme),
    )


def _stored(
    name: str,
    kind: ContentKind,
    source: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> Part:
    """``source`` in another shape and, where ``dtype`` is given, exactly converted to it."""
    stored = source.dtype if dtype is None else dtype
    return Part(name, kind, stored, shape, lambda: source.to(stored).reshape(shape).contiguous())


def _reciprocal(name: str, source: Tensor) -> Part:
    return Part(name, "scale", torch.float32, (1,), lambda: source.float().reciprocal().reshape(1))


def _weight(
    linear: QuantizedLinear, compression: Compression, *, transposed: bool
) -> Iterator[Part]:
    weight, bits = linear.weight, linear.weight_scheme.format.bits
    rows, columns = weight.shape

    if compression in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        yield _packed(weight, columns // 2, torch.uint8, pack_nibbles)
    elif compression == "pack-quantized":
        yield _packed(
            weight, -(-columns * bits // 32), torch.int32, partial(pack_integers, bits=bits)
        )
        yield Part(
            "weight_shape", "other", torch.int64, (2,), lambda: torch.tensor([rows, columns])
        )
    elif transposed:
        # GPT-2's Conv1D is [in, out] in checkpoints
        shape, dtype = (columns, rows), weight.dtype
        read = partial(in_parts, rows, shape, dtype, lambda part: weight[part].T, axis=1)
        yield Part("weight", "quantized weight", dtype, shape, read)
    else:
        yield _stored("weight", "quantized weight", weight, (rows, columns))


def _packed(
    weight: Tensor, words: int, dtype: torch.dtype, pack: Callable[[Tensor], Tensor]
) -> Part:
    rows = weight.shape[0]
    read = partial(in_parts, rows, (rows, words), dtype, lambda part: pack(weight[part]))
    return Part("weight_packed", "quantized weight", dtype, (rows, words), read)


def _weight_scales(linear: QuantizedLinear, compression: Compression) -> Iterator[Part]:
    scale, second = linear.weight_scale, linear.weight_second_scale
    shape = _stored_shape(scale)
    if compression in ("mxfp4-pack-quantized", "mxfp8-quantized"):
        yield Part("weight_scale", "scale", torch.uint8, shape, partial(_exponents, scale))
    elif second is not None:
        yield _stored("weight_scale", "scale", scale, shape, _E4M3)
        yield _reciprocal("weight_global_scale", second)
    else:
        yield _stored("weight_scale", "scale", scale, shape)


def _zero_points(linear: QuantizedLinear, zero: Tensor, compression: Compression) -> Part:
    shape, bits = _stored_shape(zero), linear.weight_scheme.format.bits
    if compression != "pack-quantized" or zero.dim() == 0:
        return _stored("weight_zero_point", "zero point", zero, shape, torch.int8)

    def packed() -> Tensor:
        return pack_integers(zero.to(torch.int8).reshape(shape).T, bits).T.contiguous()

    return Part(
        "weight_zero_point",
        "zero point",
        torch.int32,
        (-(-shape[0] * bits // 32), shape[1]),
        packed,
    )


def _input(linear: QuantizedLinear) -> Iterator[Part]:
    scale, zero = linear.input_scale, linear.input_zero_point
    if scale is None or linear.input_scheme is None:
        return
    if linear.input_scheme.scale_format == "e4m3":
        yield _reciprocal("input_global_scale", scale)
    else:
        yield _stored("input_scale", "scale", scale, (1,))
    if zero is not None:
        yield _stored("input_zero_point", "zero point", zero, (1,), torch.int8)


def _stored_shape(scale: Tensor) -> tuple[int, ...]:
    return (1,) if scale.dim() == 0 else (scale.shape[0], scale.numel() // scale.shape[0])


def _exponents(scale: Tensor) -> Tensor:
    """``127 + k`` of powers of two ``2^k``, uint8; by ``frexp``, ``2^k = 2^(k + 1) / 2``,
    exactly.
    """
    return (torch.frexp(scale.float()).exponent + (_EXPONENT_BIAS - 1)).to(torch.uint8)


def _unpacked(tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    packed = tensors.get("weight_packed")
    if packed is None:
        return tensors["weight"]
    if scheme.format == FLOAT4:
        return unpack_nibbles(packed)
    return unpack_integers(packed, scheme.format.bits, int(tensors["weight_shape"][1]))


def _unpacked_scale(stored: Tensor, scheme: TensorScheme) -> Tensor:
    if scheme.scale_format in ("e8m0", "e8m0-floor"):
        stored = torch.exp2(stored.float() - _EXPONENT_BIAS)
    elif scheme.scale_format == "e4m3":
        stored = stored.float()
    return stored.reshape(_shape(scheme.granularity, stored))


def _unpacked_zero_points(
    stored: Tensor | None, scheme: TensorScheme, scale: Tensor, rows: int
) -> Tensor | None:
    if stored is None:
        return None
    if stored.dtype == torch.int32:
        stored = unpack_integers(stored.T, scheme.format.bits, rows).T
    return stored.to(scale.dtype).reshape(scale.shape)


def _input_from(
    tensors: Mapping[str, Tensor], scheme: TensorScheme | None
) -> dict[str, Tensor | None]:
    """Arguments of :class:`QuantizedLinear`."""
    if scheme is None or not scheme.needs_calibration:
        return {"input_scale": None, "input_zero_point": None}
    if scheme.scale_format == "e4m3":
        return {
            "input_scale": tensors["input_global_scale"].reciprocal().reshape(()),
            "input_zero_point": None,
        }
    scale = tensors["input_scale"].reshape(())
    zero = None if scheme.symmetric else tensors["input_zero_point"].to(scale.dtype).reshape(())
    return {"input_scale": scale, "input_zero_point": zero}


def _shape(granularity: Granularity, stored: Tensor) -> tuple[int, ...]:
    """The artifact's shape: ``[]`` per tensor, ``[out, blocks]`` per block, ``[out]`` per
    channel.
    """
    match granularity:
        case PerTensor():
            return ()
        case PerBlock():
            return tuple(stored.shape)
        case _:
            return (stored.shape[0],)
