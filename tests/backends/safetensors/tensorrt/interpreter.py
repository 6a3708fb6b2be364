"""Runs a TensorRT network definition layer by layer in torch on the CPU: what the engine would have
to compute.

Values of constants are taken from the bundle by the name of the layer, as numpy has no dtype for
some; what is no tensor of the bundle is read from the memory that TensorRT was given.
``Quantize`` divides in float32, rounds ties to even and saturates; ``Dequantize`` multiplies in
float32 and rounds to its dtype. The number formats are :mod:`formats`' own: the arithmetic that is
checked here must not be what checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from backends.safetensors.tensorrt.loader import BundleWeights
from tests.backends.safetensors.tensorrt.formats import quantized_blocks, rounded, unpacked

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "DIV": torch.div,
}


def run(network: Any, weights: BundleWeights, inputs: Mapping[str, Tensor]) -> Tensor:
    """The value of the only output of ``network``."""
    values: dict[str, Any] = dict(inputs)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        layer.__class__ = getattr(weights.trt, _CLASSES[kind])
        given = [
            values[layer.get_input(i).name]
            for i in range(layer.num_inputs)
            if layer.get_input(i) is not None
        ]
        if kind == "CONSTANT":
            results = [_constant(layer, weights)]
        else:
            found = _LAYERS[kind](layer, *given)
            results = list(found) if isinstance(found, tuple) else [found]
        for i, result in enumerate(results):
            values[layer.get_output(i).name] = result
    result: Tensor = values[network.get_output(0).name]
    return result


def _constant(layer: Any, weights: BundleWeights) -> Tensor:
    shape, form = tuple(layer.shape), weights.forms.get(layer.name)
    if form is None or layer.name not in weights.bundle.tensors:
        return torch.tensor(layer.weights).reshape(shape)
    assert layer.get_output(0).dtype.name == form.dtype
    stored = weights.bundle.tensors[layer.name]
    if form.dtype in ("INT4", "FP4"):
        return unpacked(stored, shape, form.dtype)
    return (stored.float() if form.dtype in ("INT8", "FP8", "E8M0") else stored).reshape(shape)


def _scale_for(x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    if scale.dim() == 1:
        assert axis is not None
        return scale.float().reshape([-1 if dim == axis else 1 for dim in range(x.dim())])
    for dim in range(scale.dim()):
        assert x.shape[dim] % scale.shape[dim] == 0
        scale = scale.repeat_interleave(x.shape[dim] // scale.shape[dim], dim=dim)
    return scale.float()


def _quantize(layer: Any, x: Tensor, scale: Tensor) -> Tensor:
    return rounded(x.float() / _scale_for(x, scale, layer.axis), layer.get_output(0).dtype.name)


def _dequantize(layer: Any, x: Tensor, scale: Tensor) -> Tensor:
    return (x * _scale_for(x, scale, layer.axis)).to(_DTYPES[layer.get_output(0).dtype.name])


def _dynamic_quantize(layer: Any, x: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return quantized_blocks(x, layer.get_output(0).dtype.name, layer.block_size, second)


def _shuffle(layer: Any, x: Tensor) -> Tensor:
    first, second = (
        tuple(order)[: x.dim()] for order in (layer.first_transpose, layer.second_transpose)
    )
    x = x.permute(first) if sorted(first) == list(range(x.dim())) else x
    shape = [x.shape[dim] if size == 0 else size for dim, size in enumerate(layer.reshape_dims)]
    x = x.reshape(shape)
    second = tuple(layer.second_transpose)[: x.dim()]
    return x.permute(second)


def _matmul(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype
    assert layer.op0.name == "NONE"
    return a @ (b.mT if layer.op1.name == "TRANSPOSE" else b)


def _binary(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype  # strongly typed
    assert a.dim() == b.dim()
    return _BINARY[layer.op.name](a, b)


def _reduce(layer: Any, x: Tensor) -> Tensor:
    assert layer.op.name == "AVG"
    return x.mean([dim for dim in range(x.dim()) if layer.axes >> dim & 1], keepdim=layer.keep_dims)


def _unary(layer: Any, x: Tensor) -> Tensor:
    assert layer.op.name == "SQRT"
    return x.sqrt()


def _activation(layer: Any, x: Tensor) -> Tensor:
    assert layer.type.name == "SIGMOID"
    return x.sigmoid()


_LAYERS: dict[str, Callable[..., Any]] = {
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    "DYNAMIC_QUANTIZE": _dynamic_quantize,
    "SHUFFLE": _shuffle,
    "MATRIX_MULTIPLY": _matmul,
    "ELEMENTWISE": _binary,
    "REDUCE": _reduce,
    "UNARY": _unary,
    "ACTIVATION": _activation,
    "CAST": lambda layer, x: x.to(_DTYPES[layer.get_output(0).dtype.name]),
    "CONCATENATION": lambda layer, *parts: torch.cat(parts, dim=layer.axis),
    "SOFTMAX": lambda layer, x: x.softmax(layer.axes.bit_length() - 1),
    "GATHER": lambda layer, x, index: x.index_select(layer.axis, index),
}
_CLASSES = {
    "CONSTANT": "IConstantLayer",
    "QUANTIZE": "IQuantizeLayer",
    "DEQUANTIZE": "IDequantizeLayer",
    "DYNAMIC_QUANTIZE": "IDynamicQuantizeLayer",
    "SHUFFLE": "IShuffleLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "ELEMENTWISE": "IElementWiseLayer",
    "REDUCE": "IReduceLayer",
    "UNARY": "IUnaryLayer",
    "ACTIVATION": "IActivationLayer",
    "CAST": "ICastLayer",
    "CONCATENATION": "IConcatenationLayer",
    "SOFTMAX": "ISoftMaxLayer",
    "GATHER": "IGatherLayer",
}
