"""Tripy's keys: those of the Hugging Face model. NVIDIA's nanoGPT example has them for GPT-2, the
modules here for all.

    {linear}.weight          [out, in], blocks of input features: [in, out]      dtype of the model
    {linear}.weight_scale    [out] int8, [] float8, [in / block, out] int4       the same
    {linear}.input_scale     []                                                  the same
    {linear}.input_order     [in] where scales follow another order of the input features; int32
    {linear}.bias            [out]
    norms                    float32: the example and the modules here normalise in float32
    {linear}.rotation.*      online rotations; see :mod:`backends.safetensors.source`

A Tripy linear quantizes its weight while running, so the weight is held as the float values ``q
s``, each rounded to the model's dtype once. Quantizing these with the same scale gives ``q`` again:
with the rounding unit ``u``, half an eps,

    |fl(q s) / s - q| <= |q| u / (1 + u) <= 127 / 257 < 1/2
                                             (int8 in bfloat16, u = 2^-8; -128 s is exact)

and the other formats and dtypes have more room. Int8 in bfloat16 needs a quotient in float32 for
that: rounded to bfloat16 itself, that of 127 may become 126.5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from backends.base import ContentKind, Reason
from backends.safetensors.file_names import STATEMENT_FILE
from backends.safetensors.layout import Entry, in_parts
from backends.safetensors.source import (
    block_refusal,
    even_block,
    even_scales,
    is_rotation_key,
    norm_keys,
    original_scales,
    rotation_entries,
    uneven,
)
from backends.safetensors.tripy.dtypes import tripy_dtype
from backends.safetensors.tripy.models import refusal_of
from calib.architectures import wiring_of
from calib.arithmetic.grids import Grid, dequantize, quantize
from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
from calib.errors import BackendError
from calib.schemes import LinearScheme, PerBlock, tensor_scheme_from_dict

_PARTS = ("weight", "weight_scale", "input_scale", "input_order", "bias")


class TripyLayout:
    """See the module's docstring and :class:`~backends.safetensors.layout.Layout`."""

    target = "tripy"

    def model_refusal(
        self, config: Mapping[str, Any], linears: Mapping[str, LinearScheme]
    ) -> Reason | None:
        """No module for the model, a quantized embedding, or blocks that do not fit."""
        wiring = wiring_of(config)
        tables = [table.name for table in wiring.embeddings if table.name in linears]
        if tables:
            return Reason(
                f"tp.Embedding holds float tables, and {', '.join(tables)} shall be quantized",
                "leave embeddings in float",
            )
        return refusal_of(wiring.config) or block_refusal(config, linears, uneven)

    def entries(self, model: QuantizedModel) -> Iterator[Entry]:
        """Floats, quantized linears, online rotations."""
        norms = norm_keys(model.config)
        for key, tensor in model.floats.items():
            dtype = torch.float32 if key in norms else tensor.dtype
            read = _float_reader(model.floats, key, dtype)
            yield Entry(key, "float weight", dtype, tuple(tensor.shape), read)
        for linear in model.linears.values():
            yield from linear_entries(linear, model.dtype)
        yield from rotation_entries(model)

    def files(self, model: QuantizedModel) -> Mapping[str, str]:
        """``tripy.json``: how each linear is stored and must be built."""
        linears = {name: _statement(linear) for name, linear in model.linears.items()}
        statement = {"norm_dtype": "float32", "linears": linears}
        return {STATEMENT_FILE: json.dumps(statement, indent=1) + "\n"}

    def linears(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, QuantizedLinear]:
        """See :class:`~backends.safetensors.layout.Layout`."""
        return {name: _read_linear(name, tensors, entry) for name, entry in described.items()}

    def floats(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, Tensor]:
        """See :class:`~backends.safetensors.layout.Layout`. Norms become the dtype of the embedding
        again, exactly.
        """
        wiring = wiring_of(config)
        norms = norm_keys(config)
        dtype = tensors[wiring.embeddings[0].weight].dtype
        taken = {f"{name}.{part}" for name in described for part in _PARTS}
        return {
            key: tensors[key].to(dtype) if key in norms else tensors[key]
            for key in tensors
            if key not in taken and not is_rotation_key(key)
        }

    def cache(
        self, tensors: Mapping[str, Tensor], described: Mapping[str, Any], config: Mapping[str, Any]
    ) -> QuantizedCache:
        """There is none: :func:`backends.safetensors.tripy.rules.cache_refusal`."""
        raise ValueError("a Tripy bundle holds no KV cache")


def _float_reader(
    floats: Mapping[str, Tensor], key: str, dtype: torch.dtype
) -> Callable[[], Tensor]:
    return lambda: floats[key].to(dtype).contiguous()


def linear_entries(linear: QuantizedLinear, dtype: torch.dtype) -> Iterator[Entry]:
    """The tensors of one quantized linear, in the bundle's ``dtype``."""
    name, granularity = linear.name, linear.weight_scheme.granularity
    out, width = linear.weight.shape
    scale = linear.weight_scale

    if isinstance(granularity, PerBlock):
        size = granularity.size
        blocks = (width // even_block(name, width, linear.weight_scheme), out)
        yield Entry(
            f"{name}.weight",
            "quantized weight",
            dtype,
            (width, out),
            lambda: _products(linear, dtype, turned=True),
        )
        yield Entry(
            f"{name}.weight_scale",
            "scale",
            dtype,
            blocks,
            lambda: even_scales(scale.to(dtype), width, size).T,
        )
    else:
        yield Entry(
            f"{name}.weight",
            "quantized weight",
            dtype,
            (out, width),
            lambda: _products(linear, dtype),
        )
        yield _held(f"{name}.weight_scale", "scale", scale.to(dtype))
    if linear.input_scale is not None:
        yield _held(f"{name}.input_scale", "scale", linear.input_scale.to(dtype).reshape(()))
    if linear.weight_order is not None:
        yield _held(f"{name}.input_order", "other", linear.weight_order.to(torch.int32))
    if linear.bias is not None:
        yield _held(f"{name}.bias", "float weight", linear.bias.to(dtype))


def _held(key: str, kind: ContentKind, tensor: Tensor) -> Entry:
    return Entry(key, kind, tensor.dtype, tuple(tensor.shape), tensor.contiguous)


def _products(linear: QuantizedLinear, dtype: torch.dtype, *, turned: bool = False) -> Tensor:
    """``q s`` ``[out, in]``, its columns in the order of the scales; ``turned``: ``[in, out]``."""
    out, width = linear.weight.shape
    scale = linear.weight_scale

    def part(rows: slice) -> Tensor:
        grid = Grid(scale[rows] if scale.dim() else scale)
        weight = dequantize(linear.weight[rows], grid, linear.weight_scheme).to(dtype)
        if not math.isfinite(weight.abs().amax()):
            name = str(dtype).removeprefix("torch.")
            raise BackendError(
                f"the weights of '{linear.name}' overflow {name}", hint="use --dtype bfloat16"
            )
        return weight.T if turned else weight

    return in_parts(
        out, (width, out) if turned else (out, width), dtype, part, axis=1 if turned else 0
    )


def _read_linear(
    name: str, tensors: Mapping[str, Tensor], described: Mapping[str, Any]
) -> QuantizedLinear:
    scheme = tensor_scheme_from_dict(described["weight"])
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    if isinstance(scheme.granularity, PerBlock):
        weight = weight.T.contiguous()
        scale = original_scales(scale.T, weight.shape[1], scheme.granularity.size).contiguous()
    order = tensors.get(f"{name}.input_order")

    return QuantizedLinear(
        name=name,
        weight=quantize(weight, Grid(scale), scheme),
        weight_scale=scale,
        weight_scheme=scheme,
        bias=tensors.get(f"{name}.bias"),
        input_scheme=(
            None if described["input"] is None else tensor_scheme_from_dict(described["input"])
        ),
        input_scale=tensors.get(f"{name}.input_scale"),
        online_rotation=described["online_rotation"],
        weight_order=None if order is None else order.long(),
    )


def _statement(linear: QuantizedLinear) -> dict[str, Any]:
    granularity = linear.weight_scheme.granularity
    blocked = isinstance(granularity, PerBlock)
    return {
        "quant_dtype": tripy_dtype(linear.weight_scheme),
        "input_dtype": None if linear.input_scheme is None else tripy_dtype(linear.input_scheme),
        "orientation": "in, out" if blocked else "out, in",
        "axis": 0 if blocked or linear.weight_scale.dim() else None,
        "block_size": (
            math.gcd(linear.weight.shape[1], granularity.size)
            if isinstance(granularity, PerBlock)
            else None
        ),
    }
