"""The same quantized model for a target that computes in another dtype: floats and scales rounded
once, lazily.

Stored integers stay as they are, so a dequantized weight moves by the rounding of its scale alone,
at most half a unit in the last place where the scale is a normal number. Calibrating in the
target's own dtype rounds weights under the rounded scales and is that much closer; one calibration
for several targets is what this is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from calib.artifact.model import QuantizedCache, QuantizedLinear, QuantizedModel
from calib.artifact.prefix import Prefix
from calib.errors import QuantizationError
from calib.schemes import TensorScheme

Part = TypeVar("Part")

_ROUNDING = 2.0**-8
"""Relative error that a scale may get: that of one rounding to bfloat16, and no more than int8
values carry themselves. Subnormal numbers of float16 exceed it below 8e-6."""


def cast_model(model: QuantizedModel, dtype: torch.dtype) -> QuantizedModel:
    """``model`` for a target that computes in ``dtype``.

    Linears and float tensors are cast when they are asked for, and not kept, so a memory-mapped
    model stays one. The second-level scales of NVFP4, and scales that hold E4M3 numbers or powers
    of two, keep their float32.

    Args:
        model: the model; it is left as it is.
        dtype: float32, float16 or bfloat16.

    Raises:
        QuantizationError: when a tensor is asked for, and at once for the KV cache: a value
            overflows ``dtype``, or the scale of a channel that is not all zero underflows it.
    """
    if dtype == model.dtype:
        return model
    cache = model.cache
    if cache is not None:
        keys, values = (
            {
                layer: _cast_scale(scale, None, dtype, f"the KV cache of layer {layer}")
                for layer, scale in scales.items()
            }
            for scales in (cache.key_scale, cache.value_scale)
        )
        cache = QuantizedCache(cache.scheme, keys, values)
    return replace(
        model,
        dtype=dtype,
        prefix=None if model.prefix is None else _cast_prefix(model.prefix, dtype),
        linears=_Lazy(model.linears, lambda name, linear: cast_linear(linear, dtype)),
        floats=_Lazy(model.floats, lambda key, tensor: _cast_value(tensor, dtype, key)),
        cache=cache,
    )


def _cast_prefix(prefix: Prefix, dtype: torch.dtype) -> Prefix:
    keys, values = (
        {
            layer: _cast_value(tensor, dtype, f"the prefix of layer {layer}")
            for layer, tensor in part.items()
        }
        for part in (prefix.keys, prefix.values)
    )
    return replace(prefix, keys=keys, values=values)


def cast_linear(linear: QuantizedLinear, dtype: torch.dtype) -> QuantizedLinear:
    """One linear of :func:`cast_model`."""
    scale, zero = linear.weight_scale, linear.weight_zero_point
    if linear.weight_scheme.scale_format == "compute":
        scale = _cast_scale(scale, _occupied(linear), dtype, f"the weight of '{linear.name}'")
        zero = None if zero is None else zero.to(dtype)
    seen, seen_zero = linear.input_scale, linear.input_zero_point
    if seen is not None and _in_compute_dtype(linear.input_scheme):
        seen = _cast_scale(seen, None, dtype, f"the input of '{linear.name}'")
        seen_zero = None if seen_zero is None else seen_zero.to(dtype)
    bias = None if linear.bias is None else _cast_value(linear.bias, dtype, f"{linear.name}.bias")
    return replace(
        linear,
        weight_scale=scale,
        weight_zero_point=zero,
        bias=bias,
        input_scale=seen,
        input_zero_point=seen_zero,
    )


def _in_compute_dtype(scheme: TensorScheme | None) -> bool:
    return scheme is not None and scheme.scale_format == "compute"


def _occupied(linear: QuantizedLinear) -> Callable[[Tensor], bool]:
    """Tells whether anything but zero is stored under marked scales of the weight."""
    return lambda marked: bool((replace(linear, weight_scale=marked.float()).values() != 0).any())


def _cast_scale(
    scale: Tensor, occupied: Callable[[Tensor], bool] | None, dtype: torch.dtype, where: str
) -> Tensor:
    """``scale`` in ``dtype``, every one of them > 0.

    Args:
        scale: finite and > 0. That of a dead channel is the smallest normal number of the dtype it
            was calibrated in; where it underflows, the smallest of ``dtype`` stands in. So may the
            scale of one that is nearly dead be in float16, which is no reason to change it.
        occupied: of a weight, whether marked scales have values other than zero under them: they
            matter then.
        dtype: what to cast to.
        where: names it in the error.
    """
    cast = _cast_value(scale, dtype, f"a scale of {where}")
    lost = (cast.double() - scale.double()).abs() > scale.double() * _ROUNDING
    alive = scale > torch.finfo(scale.dtype).tiny
    if occupied(lost) if occupied is not None else bool((lost & alive).any()):
        raise QuantizationError(
            f"a scale of {where} underflows {_name(dtype)}: it is {float(scale.min()):.3g}",
            hint=(
                f"calibrate for that target: rotq calibrate --dtype {_name(dtype)}; or export with"
                " --dtype float32"
            ),
        )
    return torch.where(lost, torch.full_like(cast, torch.finfo(dtype).tiny), cast)


def _cast_value(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise QuantizationError(
            f"'{name}' overflows {_name(dtype)}: its largest magnitude is"
            f" {float(tensor.abs().max()):.4g}",
            hint="give --dtype bfloat16 or float32",
        )
    return cast


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Lazy(Mapping[str, Part]):
    """A mapping whose values are changed when they are asked for."""

    def __init__(self, inner: Mapping[str, Part], change: Callable[[str, Part], Part]) -> None:
        self._inner = inner
        self._change = change

    def __getitem__(self, key: str) -> Part:
        return self._change(key, self._inner[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)
