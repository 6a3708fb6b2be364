"""The tensors of one linear in ModelOpt's unified layout, and back.

    weight            int8 or float8_e4m3fn [out, in] INT4: uint8 [out / 2, in], byte_{ji} =
                      (q_{2j,i} & 15) | (q_{2j+1,i} & 15) << 4 NVFP4: uint8 [out, in / 2], byte_{oj}
                      = c_{o,2j} | c_{o,2j+1} << 4
    weight_scale      float32 [out], [] or [out, in / block]; NVFP4: float8_e4m3fn; MXFP8: uint8,
    127 + log2(s) weight_scale_2    float32 []: NVFP4's second level; for W4A8_AWQ max |w| / 448
    over the linears that readers merge input_scale       float32 []: s; NVFP4: amax / (6 * 448)
    pre_quant_scale   [in], dtype of the model: ones, for AWQ where readers merge nothing bias
    [out]

Scales are the artifact's in float32, whatever the model's dtype: nothing is rounded, so all comes
back to the last bit.

W4A8_AWQ's second scale is no factor of the others: a reader divides the INT4 scales by it to have
weights within FP8's range. TensorRT-LLM asks for a ``pre_quant_scale`` where it merges nothing,
because ModelOpt's AWQ always leaves one there; rotq's smoothing is folded, so its own is one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backends.base import ContentKind
from backends.safetensors.compressed_tensors.packing import pack_nibbles, unpack_nibbles
from backends.safetensors.layout import Entry, in_parts
from backends.safetensors.modelopt.algorithms import Algorithm, algorithm_of
from backends.safetensors.source import block_size
from calib.artifact import QuantizedLinear
from calib.errors import BackendError
from calib.schemes import FLOAT4, FLOAT8, INT4, LinearScheme, TensorScheme, tensor_scheme_from_dict

PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "bias")
_EXPONENT_BIAS = 127


def format_of(linear: QuantizedLinear) -> Algorithm:
    """ModelOpt's format of ``linear``.

    Raises:
        BackendError: something of it has no place in the layout.
    """
    algorithm = algorithm_of(LinearScheme(linear.weight_scheme, linear.input_scheme))
    if algorithm is None:
        raise BackendError(
            f"ModelOpt has no format for '{linear.name}'",
            hint="`rotq backends` says which schemes each target takes",
        )
    if linear.weight_order is not None:
        raise BackendError(
            f"the blocks of '{linear.name}' follow an order of the input features of their own"
            " (GPTQ's act-order), and ModelOpt's have none",
            hint=(
                "leave static_groups on: groups of neighbouring input features, as in"
                " --weight-algorithm gptq"
            ),
        )

    rows = linear.weight.shape[0]
    if linear.weight_scheme.format == INT4 and rows % 2:
        raise BackendError(
            f"ModelOpt packs INT4 weights by two outputs, and '{linear.name}' has {rows}",
            hint=f"leave it in float with --override '{linear.name}=float'",
        )

    return algorithm


def entries_of(
    linear: QuantizedLinear, module: str, merged: Collection[QuantizedLinear], dtype: torch.dtype
) -> Iterator[Entry]:
    """The tensors of ``linear`` under the name ``module``.

    Args:
        linear: the linear, or the rows of one that a module of its own holds.
        module: its name in the checkpoint.
        merged: the whole linears that readers make one matrix of, this one included.
        dtype: of the model.

    Raises:
        BackendError: it has no place in the layout.
    """
    algorithm = format_of(linear)

    def entry(
        part: str,
        kind: ContentKind,
        form: torch.dtype,
        shape: tuple[int, ...],
        read: Callable[[], Tensor],
    ) -> Entry:
        return Entry(f"{module}.{part}", kind, form, shape, read)

    def scale(part: str, source: Tensor) -> Entry:
        return entry(
            part, "scale", torch.float32, tuple(source.shape), lambda: source.float().contiguous()
        )

    yield entry("weight", "quantized weight", *_weight(linear))
    yield entry("weight_scale", "scale", *_scales(linear))
    if linear.weight_second_scale is not None:
        yield scale("weight_scale_2", linear.weight_second_scale.reshape(()))
    if algorithm.awq and linear.input_scheme is not None:
        yield entry("weight_scale_2", "scale", torch.float32, (), partial(_range_of, merged))
    if linear.input_scale is not None:
        yield scale("input_scale", linear.input_scale.reshape(()))
    if algorithm.awq and len(merged) == 1:
        width = (linear.weight.shape[1],)
        yield entry(
            "pre_quant_scale", "scale", dtype, width, partial(torch.ones, width, dtype=dtype)
        )
    if linear.bias is not None:
        yield entry(
            "bias",
            "float weight",
            linear.bias.dtype,
            tuple(linear.bias.shape),
            linear.bias.contiguous,
        )


def linear_from(
    name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> QuantizedLinear:
    """The inverse of :func:`entries_of`.

    Args:
        name: of the linear in the source model.
        described: its description.
        tensors: its tensors by what follows the module's name.
        dtype: of the model.

    Raises:
        KeyError: a tensor is missing.
    """
    scheme = tensor_scheme_from_dict(dict(described["weight"]))
    input_scheme = (
        None if described["input"] is None else tensor_scheme_from_dict(dict(described["input"]))
    )
    input_scale = None
    if input_scheme is not None and input_scheme.needs_calibration:
        input_scale = tensors["input_scale"].to(
            torch.float32 if input_scheme.scale_format == "e4m3" else dtype
        )

    return QuantizedLinear(
        name=name,
        weight=_unpacked(tensors["weight"], scheme),
        weight_scale=_unpacked_scales(tensors["weight_scale"], scheme, dtype),
        weight_scheme=scheme,
        bias=tensors.get("bias"),
        input_scheme=input_scheme,
        input_scale=input_scale,
        online_rotation=described["online_rotation"],
        weight_second_scale=tensors["weight_scale_2"] if scheme.scale_format == "e4m3" else None,
    )


_Content = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]
"""Dtype, shape and how it is made."""


def _weight(linear: QuantizedLinear) -> _Content:
    weight, (rows, columns) = linear.weight, linear.weight.shape
    if linear.weight_scheme.format == INT4:
        shape = (rows // 2, columns)
        return (
            torch.uint8,
            shape,
            partial(in_parts, rows // 2, shape, torch.uint8, partial(_pairs_of_rows, weight)),
        )
    if linear.weight_scheme.format == FLOAT4:
        shape = (rows, columns // 2)
        return (
            torch.uint8,
            shape,
            partial(in_parts, rows, shape, torch.uint8, lambda part: pack_nibbles(weight[part])),
        )

    return weight.dtype, (rows, columns), weight.contiguous


def _pairs_of_rows(weight: Tensor, part: slice) -> Tensor:
    low, high = (
        weight[2 * part.start + offset : 2 * part.stop : 2].view(torch.uint8) for offset in (0, 1)
    )
    return (low & 0x0F) | (high << 4)


def _unpacked(stored: Tensor, scheme: TensorScheme) -> Tensor:
    if scheme.format == FLOAT4:
        return unpack_nibbles(stored)
    if scheme.format != INT4:
        return stored
    # each value in the high half of its byte
    rows = torch.stack([stored << 4, stored & 0xF0], dim=1).flatten(0, 1)
    return rows.view(torch.int8) >> 4  # which this brings down with its sign


def _scales(linear: QuantizedLinear) -> _Content:
    scale, stored = linear.weight_scale, linear.weight_scheme.scale_format
    shape = tuple(scale.shape)
    if stored == "e4m3":
        return torch.float8_e4m3fn, shape, lambda: scale.to(torch.float8_e4m3fn).contiguous()
    if stored == "e8m0":
        return torch.uint8, shape, partial(_exponents, scale)
    return torch.float32, shape, lambda: scale.float().contiguous()


def _exponents(scale: Tensor) -> Tensor:
    """``127 + k`` of powers of two ``2^k``, uint8; by ``frexp``, ``2^k = 2^(k + 1) / 2``,
    exactly.
    """
    return (torch.frexp(scale.float()).exponent + (_EXPONENT_BIAS - 1)).to(torch.uint8).contiguous()


def _unpacked_scales(stored: Tensor, scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    if scheme.scale_format == "e8m0":
        return torch.exp2(stored.float() - _EXPONENT_BIAS)
    return stored.float() if scheme.scale_format == "e4m3" else stored.to(dtype)


def _range_of(linears: Collection[QuantizedLinear]) -> Tensor:
    """``max |w| / 448`` over INT4 weights in blocks: the largest ``|q| s`` of all blocks."""
    largest = []
    for linear in linears:
        size = block_size(linear.weight_scheme)
        assert size is not None
        blocks = linear.weight.reshape(linear.weight.shape[0], -1, size)
        reached = torch.maximum(blocks.amax(dim=2), -blocks.amin(dim=2))
        largest.append((reached.float() * linear.weight_scale.float()).amax())
    return torch.stack(largest).amax() / FLOAT8.maxbound
