"""Keys and packing of a ``tensorrt`` bundle: what a network built with TensorRT's Python API takes
as constants.

    {linear}.weight           [in, out], so that ``x W`` needs no transpose: int8, float8_e4m3fn;
                              int4 and E2M1 packed as :mod:`backends.safetensors.tensorrt.packing`
                              says, uint8
    {linear}.weight_scale     [out], [] or [in / block, out]: dtype of the model; NVFP4
                              float8_e4m3fn; MXFP8 float8_e8m0fnu
    {linear}.weight_scale_2   []: float32, the factor of NVFP4's scales
    {linear}.input_scale      []: dtype of the model; NVFP4 float32
    {linear}.input_order      [in] where scales follow another order of the input features; int32
    {linear}.bias             [out]
    {linear}.rotation.*       online rotations; see :mod:`backends.safetensors.source`
    {attention}.k_scale, {attention}.v_scale      [] where the KV cache is quantized, and
    {attention}.rotation.*    where its keys are rotated

Linears left in float are ``[in, out]`` as well. An embedding is ``[vocabulary, width]``, its scales
by row. Everything else is as the Hugging Face model has it, under its key there.

``[in, out]`` because INT8 inputs with INT4 weights do not build in TensorRT-RTX 1.7.1 with a
transposed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backends.base import ContentKind, Reason
from backends.safetensors.layout import Entry, in_parts
from backends.safetensors.source import (
    block_refusal,
    even_block,
    even_scales,
    is_rotation_key,
    original_scales,
    rotation_entries,
    uneven,
)
from backends.safetensors.tensorrt.packing import pack, packed_size, unpack
from calib.architectures import wiring_of
from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
from calib.schemes import FLOAT4, INT4, LinearScheme, PerBlock, tensor_scheme_from_dict

_PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "input_order", "bias")
_PACKED = (INT4, FLOAT4)
_SCALE_DTYPES = {
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
    "e8m0-floor": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class _Names:
    """What the keys of one model mean."""

    tables: frozenset[str]
    """Embeddings, which are not transposed."""
    upright: frozenset[str]
    """Weights that the artifact has ``[out, in]`` and the bundle transposed."""
    attentions: Mapping[int, str]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Names:
        wiring = wiring_of(config)
        return cls(
            frozenset(table.name for table in wiring.embeddings),
            frozenset(spec.weight for spec in wiring.linears if spec.layout != "experts"),
            {layer: wiring.attention(layer) for layer in wiring.layers},
        )


class TensorRTLayout:
    """See the module's docstring and :class:`~backends.safetensors.layout.Layout`."""

    target = "tensorrt"

    def model_refusal(
        self, config: Mapping[str, Any], linears: Mapping[str, LinearScheme]
    ) -> Reason | None:
        """Blocks that do not fit; whoever builds the network builds any model."""
        return block_refusal(config, linears, uneven)

    def entries(self, model: QuantizedModel) -> Iterator[Entry]:
        """Floats, quantized linears, the cache's scales, online rotations."""
        names = _Names.of(model.config)
        for key, tensor in model.floats.items():
            flip = key in names.upright
            shape = tuple(reversed(tensor.shape)) if flip else tuple(tensor.shape)
            yield Entry(
                key, "float weight", tensor.dtype, shape, _float_reader(model.floats, key, flip)
            )

        for linear in model.linears.values():
            yield from _linear_entries(linear, linear.name not in names.tables)
        if model.cache is not None:
            for layer, scale in model.cache.key_scale.items():
                yield _held(f"{names.attentions[layer]}.k_scale", "scale", scale)
                yield _held(
                    f"{names.attentions[layer]}.v_scale", "scale", model.cache.value_scale[layer]
                )

        yield from rotation_entries(model)

    def files(self, model: QuantizedModel) -> Mapping[str, str]:
        """None besides: the manifest says how every linear is quantized."""
        return {}

    def linears(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, QuantizedLinear]:
        """See :class:`~backends.safetensors.layout.Layout`."""
        tables = _Names.of(config).tables
        return {
            name: _read_linear(name, tensors, entry, name not in tables)
            for name, entry in described.items()
        }

    def floats(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, Tensor]:
        """See :class:`~backends.safetensors.layout.Layout`."""
        names = _Names.of(config)
        of_linears = {f"{name}.{part}" for name in described for part in _PARTS}
        of_caches = {
            f"{attention}.{part}_scale" for attention in names.attentions.values() for part in "kv"
        }
        keys = [
            key for key in tensors if key not in of_linears | of_caches and not is_rotation_key(key)
        ]

        return {
            key: tensors[key].T.contiguous() if key in names.upright else tensors[key]
            for key in keys
        }

    def cache(
        self, tensors: Mapping[str, Tensor], described: Mapping[str, Any], config: Mapping[str, Any]
    ) -> QuantizedCache:
        """See :class:`~backends.safetensors.layout.Layout`."""
        attentions = _Names.of(config).attentions
        keys, values = (
            {layer: tensors[f"{attentions[layer]}.{part}_scale"] for layer in described["layers"]}
            for part in "kv"
        )
        return QuantizedCache(tensor_scheme_from_dict(described["scheme"]), keys, values)


def unpacked_shape(nbytes: int, scales: Sequence[int], flip: bool) -> tuple[int, int]:
    """Shape of a packed weight, which is in blocks, from that of its scales; ``flip``: ``[in,
    out]``.
    """
    out = scales[1 if flip else 0]
    width = 2 * nbytes // out
    return (width, out) if flip else (out, width)


def _float_reader(floats: Mapping[str, Tensor], key: str, flip: bool) -> Callable[[], Tensor]:
    return lambda: (floats[key].T if flip else floats[key]).contiguous()


def _linear_entries(linear: QuantizedLinear, flip: bool) -> Iterator[Entry]:
    name, scheme = linear.name, linear.weight_scheme
    out, width = linear.weight.shape
    stored = (width, out) if flip else (out, width)

    def oriented(tensor: Tensor) -> Tensor:
        return (tensor.T if flip else tensor).contiguous()

    def packed_weight() -> Tensor:
        # a stored row that ends in the middle of a byte runs on into the next
        if not flip or out % 2:
            return pack(oriented(linear.weight))
        pairs = (width, out // 2)
        return in_parts(
            out // 2, pairs, torch.uint8, lambda part: _pairs(linear.weight, part).T, axis=1
        ).reshape(-1)

    if scheme.format in _PACKED:
        packed = (packed_size(out * width),)
        yield Entry(f"{name}.weight", "quantized weight", torch.uint8, packed, packed_weight)
    else:
        yield Entry(
            f"{name}.weight",
            "quantized weight",
            linear.weight.dtype,
            stored,
            lambda: oriented(linear.weight),
        )
    scale = linear.weight_scale
    if isinstance(scheme.granularity, PerBlock):
        dtype = _SCALE_DTYPES.get(scheme.scale_format, scale.dtype)
        size = scheme.granularity.size
        count = width // even_block(name, width, scheme)
        shape = (count, out) if flip else (out, count)
        yield Entry(
            f"{name}.weight_scale",
            "scale",
            dtype,
            shape,
            lambda: oriented(even_scales(scale, width, size).to(dtype)),
        )
    else:
        yield _held(f"{name}.weight_scale", "scale", scale)
    if linear.weight_second_scale is not None:
        yield _held(f"{name}.weight_scale_2", "scale", linear.weight_second_scale.reshape(()))
    if linear.input_scale is not None:
        yield _held(f"{name}.input_scale", "scale", linear.input_scale.reshape(()))
    if linear.weight_order is not None:
        yield _held(f"{name}.input_order", "other", linear.weight_order.to(torch.int32))
    if linear.bias is not None:
        yield _held(f"{name}.bias", "float weight", linear.bias)


def _pairs(weight: Tensor, part: slice) -> Tensor:
    """Two neighbouring rows each of codes ``[out, in]`` in one of bytes, ``[pairs, in]``; turned,
    they are packed.
    """
    rows = weight[2 * part.start : 2 * part.stop].view(torch.uint8)
    return (rows[0::2] & 0xF) | (rows[1::2] << 4)


def _held(key: str, kind: ContentKind, tensor: Tensor) -> Entry:
    return Entry(key, kind, tensor.dtype, tuple(tensor.shape), tensor.contiguous)


def _read_linear(
    name: str, tensors: Mapping[str, Tensor], described: Mapping[str, Any], flip: bool
) -> QuantizedLinear:
    scheme = tensor_scheme_from_dict(described["weight"])
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    if isinstance(scheme.granularity, PerBlock):
        if scheme.format in _PACKED:
            weight = unpack(
                weight,
                unpacked_shape(weight.numel(), scale.shape, flip),
                signed=scheme.format == INT4,
            )
        width = weight.shape[0 if flip else 1]
        scale = original_scales(
            scale.T if flip else scale, width, scheme.granularity.size
        ).contiguous()
        scale = scale if scheme.scale_format == "compute" else scale.float()

    order = tensors.get(f"{name}.input_order")
    return QuantizedLinear(
        name=name,
        weight=(weight.T if flip else weight).contiguous(),
        weight_scale=scale,
        weight_scheme=scheme,
        bias=tensors.get(f"{name}.bias"),
        input_scheme=None
        if described["input"] is None
        else tensor_scheme_from_dict(described["input"]),
        input_scale=tensors.get(f"{name}.input_scale"),
        online_rotation=described["online_rotation"],
        weight_second_scale=tensors.get(f"{name}.weight_scale_2"),
        weight_order=None if order is None else order.long(),
    )
